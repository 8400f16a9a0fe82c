"""A hook of mkdocs: the site has the repository's tree, README.md as its home, so that links work on GitHub and on the site."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**/*.*", "tools/cuda_emulator/README.md")
RESULTS = ("benchmarks/results/*/*.md", "benchmarks/results/*/*.png")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in [file for file in files if file.src_dir == config.docs_dir]:  # their names are counted from docs/
        files.remove(file)
    for path in sorted(path for part in (*PAGES, *RESULTS) for path in ROOT.glob(part)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files
