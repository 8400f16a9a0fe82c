# make demo    set up, build, and show it on real pictures and digits      (3 to 4 minutes on 2 fast cores, set-up included)
# make test    set up, build, run the tests
# make bench   tables and plots of layers, blocks and networks (docs/benchmarks.md)
# make fuzz    10,000 random problems a property test; make slow: the tests that need minutes or 20 GB
# make sanitize  the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, property tests included
# make models  whole models, converted and compiled by the backend against plain PyTorch; the README's table and plot are of these
# make sweep   the time an element costs at neighbouring sizes and as N, C and H grow
# make traffic the bytes that the CUDA kernels move, counted without a GPU
# make build-time  what each source file takes to compile; make wheel: a wheel for every machine, make check-wheel tries it
# make gpu-check  on a machine with a GPU: build, tests, compute-sanitizer, benchmark; offline, in PYTHON's environment (python3)
# make docs    the pages and the API as a site, in build/site
# make lint    ruff and clang-format, as the pre-commit hooks run them; make format applies them
#
# Each does the whole set-up in .venv, at the versions of constraints.txt. PYTHON=/path/to/python uses that environment as it
# is: it needs torch >= 2.10, ninja, pybind11, setuptools and what the target uses, and nothing is installed into it.

VENV := .venv
ifdef PYTHON
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.ready-package
endif
BASE_PYTHON ?= python3
CLANG_FORMAT := $(PY) -c 'import clang_format; clang_format.clang_format()'
# Development builds cover two architectures and PTX; an installed package covers all (setup.py).
export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0+PTX

.PHONY: test slow fuzz sanitize demo bench models sweep traffic build-time wheel check-wheel gpu-check docs lint format build compiled clean
.DELETE_ON_ERROR:

# One process a core, four at most (each holds a gigabyte), of one thread each: threads of several processes that wait for each
# other on the same cores would spin. The tests that need more threads set them.
test: environment-test build
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadgroup

slow: environment-test build
	$(PY) -m pytest -m slow

fuzz: environment-test build
	HYPOTHESIS_PROFILE=fuzz $(PY) -m pytest -m "not slow" -k random

# Python itself is not built so: the sanitizer's runtime is loaded before it (libstdc++ too: the runtime looks for its functions
# at its start). The 64-byte instruction sets are emulated, so that all of them run anywhere and every access is seen, and not
# optimized, which the compiler takes minutes for; fewer filter sizes than usual; and without Python's -fwrapv, which would hide
# overflows.
SANITIZERS := -fsanitize=address,undefined
SANITIZED := build/sanitized/lib
sanitize: environment-test
	DWCONV_EXT_CUDA=0 LDFLAGS="$(SANITIZERS)" \
	  DWCONV_EXT_CXXFLAGS="-O0 -w -fno-wrapv $(SANITIZERS) -fno-sanitize-recover=all $$($(PY) tools/cpu_emulator/__init__.py)" \
	  $(PY) setup.py -q build --build-base build/sanitized --build-lib $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(PY) -m pytest --capture=sys -o pythonpath="$(SANITIZED) tests/support tools" tests/kernels/test_kernels.py tests/ops/test_memory.py tests/ops/test_depthwise.py \
	    tests/ops/test_depthwise_packed.py tests/ops/test_separable.py tests/ops/test_pointwise.py tests/ops/test_inverted_residual.py \
	    tests/ops/test_patches.py tests/ops/test_squeeze_excitation.py tests/ops/test_channels.py tests/nn/test_steps.py \
	    tests/nn/test_fused_ds_conv.py tests/ops/test_batch_norm.py tests/ops/test_conv1d.py tests/ops/test_conv_transpose.py \
	    -m "not slow" -k "not emulator"

# Where no GPU would run the CUDA half, the demo does not wait for it.
ifeq ($(shell nvidia-smi -L 2>/dev/null | grep ^GPU)$(wildcard dwconv_ext/_C_cuda*.so),)
demo: export DWCONV_EXT_CUDA ?= 0
endif
demo: environment-examples build
	PYTHONPATH=. $(PY) examples/demo.py

bench: environment-bench build
	for suite in depthwise separable network; do $(PY) -m benchmarks $$suite --save || exit 1; done

models: environment-bench build
	$(PY) -m benchmarks models --no-compile --save

sweep: environment-bench build
	$(PY) -m benchmarks sweep --save

traffic: environment-bench build
	$(PY) -m benchmarks traffic --save

build-time: environment-test
	$(PY) tools/build_time.py

# All instruction sets and all architectures, compiled into a folder of its own. torch brings its libraries and CUDA's.
FROM_TORCH := libtorch* libc10* libcuda*
wheel: environment-wheel
	rm -rf build/wheel/lib* build/wheel/bdist* build/wheel/*.whl dist/*.whl
	env -u TORCH_CUDA_ARCH_LIST $(PY) setup.py -q build --build-base build/wheel bdist_wheel --skip-build --dist-dir build/wheel
	PATH="$(dir $(abspath $(PY))):$$PATH" $(PY) -m auditwheel repair --wheel-dir dist $(FROM_TORCH:%=--exclude '%.so*') build/wheel/*.whl
	du -h dist/*.whl

check-wheel: $(if $(PYTHON),,$(PY))
	$(PY) tools/check_wheel.py dist/*.whl

# Nothing is fetched: torch, ninja, pybind11, pytest and numpy must be there.
gpu-check:
	$(or $(PYTHON),python3) tools/gpu_check.py

# The sources are read, not imported: nothing is built.
docs: environment-docs
	$(PY) -m mkdocs build --strict

lint: environment-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(CLANG_FORMAT) --dry-run -Werror

format: environment-dev
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(CLANG_FORMAT) -i

build: compiled $(INSTALLED)

compiled:
	$(PY) setup.py -q build_ext --inplace

clean:
	rm -rf build *.egg-info dwconv_ext/*.so dwconv_ext/_build_times.json

# An editable install, once: it finds everything compiled.
$(VENV)/.ready-package: pyproject.toml dwconv_ext/__init__.py | compiled
	$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

# One stamp an extra of pyproject.toml: what is installed already is not installed again.
ifdef PYTHON
environment-%: ;
else
environment-%: $(VENV)/.ready-% ;
endif

.PRECIOUS: $(VENV)/.ready-%
$(VENV)/.ready-%: pyproject.toml constraints.txt tools/requirements.py | $(VENV)/bin/python
	$(PY) tools/requirements.py $* > $(VENV)/requirements-$*.txt
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -r $(VENV)/requirements-$*.txt
	touch $@

$(VENV)/bin/python:
	$(BASE_PYTHON) -m venv $(VENV)
