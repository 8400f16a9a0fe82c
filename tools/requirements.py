"""Prints what pyproject.toml requires to build and run the package, and for the extras named: one requirement a line."""

import sys

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
extras = project["project"]["optional-dependencies"]
unknown = set(sys.argv[1:]) - set(extras)
if unknown:
    sys.exit(f"no extra {', '.join(sorted(unknown))}; pyproject.toml has {', '.join(extras)}")
lines = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
for extra in sys.argv[1:]:
    lines += extras[extra]
print("\n".join(dict.fromkeys(lines)))
