"""Builds ``tnt_kernels._C``. Everything that is static stands in pyproject.toml.

``csrc/cpu/rows.cpp`` is compiled once per instruction set, ``csrc/bind.cpp`` once, and the lot is
linked against nothing but the C++ and OpenMP runtimes: one build serves every torch. Where there is
an nvcc, ``csrc/cuda/*.cu`` join, with the CUDA runtime linked statically. Environment:

    MAX_JOBS                      compilers at a time; default: one per CPU
    CXX, CXXFLAGS                 the compiler, and flags that go before ours
    TNT_KERNELS_SANITIZE          "address,undefined": an instrumented build, see `make sanitize`
    TNT_KERNELS_SKIP_CPU_BUILD=1  install the Python part alone
    TNT_KERNELS_SKIP_CUDA_BUILD=1   no CUDA kernels, whatever is there
    TNT_KERNELS_FORCE_CUDA_BUILD=1  a missing nvcc is an error
    CUDA_HOME                     where CUDA is; default: where nvcc on PATH is, /usr/local/cuda
    TORCH_CUDA_ARCH_LIST          as for torch's extensions: "8.0;9.0;10.0+PTX" (the default)

Without a C++ compiler, too, the Python part is installed alone, and ``tnt-kernels info`` says so.
A compiler that is there and fails is an error.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# -fno-fast-math undoes a -ffast-math in CXXFLAGS, under which an exp need not know infinity, and
# linking sets flush-to-zero for the whole process. It comes first: it resets the flags after it.
# -ffp-contract=off: csrc/elementary.h writes out where it fuses, or p = q would not give exactly 0.
# -fno-tree-slp-vectorize: numbers that were just stored one by one would be loaded as a vector, which waits until they
# have left the processor's store buffer. Loops are vectors where it matters (csrc/cpu/vector.h).
CXX_FLAGS = """-std=c++17 -O3 -fno-fast-math -fno-math-errno -fno-trapping-math -ffp-contract=off
    -fno-tree-slp-vectorize -fvisibility=hidden -fno-semantic-interposition -g0
    -Wall -Wextra -Werror=return-type -Werror=uninitialized -Werror=format""".split()

# Beyond "baseline", best last.
INSTRUCTION_SETS = {
    "avx2": "-mavx2 -mfma -mf16c -mbmi -mbmi2".split(),
    "avx512": """-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512
        -mavx2 -mfma -mf16c -mbmi -mbmi2""".split(),
}


# -fmad=false: as -ffp-contract=off. The host compiler gets the flags that it knows.
NVCC_FLAGS = """-std=c++17 -O3 -fmad=false -Xptxas -v
    -Xcompiler -fPIC,-fvisibility=hidden,-fno-fast-math,-ffp-contract=off,-g0""".split()
# Compressed images are a quarter of the size, and unpacked once a process; before CUDA 12.9, a third.
SMALLEST, SMALL = ["-compress-mode=size"], ["-Xfatbin", "-compress-all"]
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"


class Job(NamedTuple):
    source: str
    name: str  # of the object file: a source may be compiled more than once
    defines: list[tuple[str, str]]
    flags: list[str]


def is_set(variable):
    return os.environ.get(variable, "0") not in ("", "0")


def cuda_home():
    """The folder of a CUDA installation with an nvcc and the static runtime, or None."""
    found = shutil.which("nvcc")
    named = os.environ.get("CUDA_HOME")
    candidates = (
        [named] if named else [found and Path(found).resolve().parents[1], "/usr/local/cuda"]
    )
    for home in candidates:
        if home and Path(home, "bin", "nvcc").exists() and cuda_libraries(Path(home)):
            return Path(home)
    return None


def cuda_libraries(home):
    for folder in (home / "lib64", home / "lib"):
        if (folder / "libcudart_static.a").exists():
            return folder
    return None


def gencode_flags(architectures):
    """``-gencode`` for a list as in TORCH_CUDA_ARCH_LIST: "8.0 9.0a;10.0+PTX"."""
    flags = []
    for name in architectures.replace(";", " ").split():
        number = name.removesuffix("+PTX")
        digits = number.rstrip("af").replace(".", "")
        if not digits.isdigit() or "." not in number:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: {name!r}, expected one like 9.0 or 9.0+PTX")
        if int(digits) < 80:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: {name!r}, the kernels need 8.0 or later")
        number = number.replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildNative(build_ext):
    def initialize_options(self):
        super().initialize_options()
        self.missing, self.built = "", {}  # why there is no _C, or facts of it: _build_info.json

    def run(self):
        if is_set("TNT_KERNELS_SKIP_CPU_BUILD"):
            self.leave_out("TNT_KERNELS_SKIP_CPU_BUILD was set at installation")
        super().run()
        in_place = self.get_finalized_command("build_py").get_package_dir("tnt_kernels")
        package = Path(in_place if self.inplace else f"{self.build_lib}/tnt_kernels")
        if self.missing:  # a library that an earlier build left is not what was asked for
            for stale in package.glob("_C.*.so"):
                stale.unlink()
        package.mkdir(parents=True, exist_ok=True)
        info = {"native_missing": self.missing, **self.built}
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def leave_out(self, reason):
        self.missing, self.extensions = reason, []
        print(f"tnt_kernels: installing WITHOUT native kernels: {reason}", file=sys.stderr)

    def build_extensions(self):
        if self.compiler.compiler_type != "unix":
            return self.leave_out(f"needs GCC or Clang, here is {self.compiler.compiler_type}")
        compiler = self.compiler.compiler_so_cxx[0]
        if not shutil.which(compiler):
            return self.leave_out(
                f"no C++ compiler at installation ({compiler}); install one, then tnt_kernels again"
            )
        super().build_extensions()

    def build_extension(self, ext):
        # A compiler answers better than the machine: for cross and universal builds, and old ones.
        uses_openmp = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }"
        openmp = ["-fopenmp"] if self.works(uses_openmp, ["-fopenmp"]) else []
        isas = {"baseline": []}
        for name, flags in INSTRUCTION_SETS.items():
            if self.works("#ifndef __x86_64__\n#error\n#endif", flags):
                isas[name] = flags

        sanitize = os.environ.get("TNT_KERNELS_SANITIZE", "")
        instrument = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else []
        # -fopenmp-simd keeps the vector loops where there is no OpenMP runtime.
        flags = [*CXX_FLAGS, *(openmp or ["-fopenmp-simd"]), *instrument]
        if sanitize:
            flags += ["-O1", "-g", "-fno-omit-frame-pointer", "-UNDEBUG"]

        # The linker keeps the first copy of an inline function that several objects hold. Those
        # with instructions that a machine may lack come last, or all the others might run theirs.
        have = [(f"TNT_HAVE_{name.upper()}", "1") for name in isas]
        home, cuda_missing = self.find_cuda()
        if home:
            have.append(("TNT_HAVE_CUDA", "1"))
        version = ("TNT_VERSION", f'"{self.distribution.get_version()}"')
        jobs = [Job("csrc/bind.cpp", "bind", [version, *have], flags)]
        for name, isa_flags in isas.items():
            jobs.append(Job("csrc/cpu/rows.cpp", name, [("TNT_ISA", name)], [*flags, *isa_flags]))

        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
        gencode = [*gencode_flags(architectures), *self.compression(home)] if home else []
        workers = int(os.environ.get("MAX_JOBS") or self.parallel or os.cpu_count() or 1)
        print(f"tnt_kernels: compiling {', '.join(job.name for job in jobs)}", file=sys.stderr)
        try:
            with ThreadPoolExecutor(workers) as pool:
                # The CUDA kernels take the longest, so they begin first.
                sources = sorted(Path("csrc/cuda").glob("*.cu")) if home else []
                cuda = [pool.submit(self.compile_cuda, home, gencode, source) for source in sources]
                objects = list(pool.map(self.compile, jobs))
                objects += [job.result() for job in cuda]
            # Where torch has its libgomp under another name (wheels before 2.8), -fopenmp maps a
            # second one, but the symbols are still looked up, and found, in torch's first.
            flags = [*openmp, *instrument]
            if home:
                # by name and not by path, behind the objects that need it
                flags += [
                    f"-L{cuda_libraries(home)}",
                    "-lcudart_static",
                    "-lrt",
                    "-lpthread",
                    "-ldl",
                ]
            if sys.platform == "linux" and not sanitize:
                flags += ["-Wl,-s"]  # without symbols, which take half a megabyte
            self.link(objects, self.get_ext_fullpath(ext.name), flags)
        except (CompileError, LinkError) as error:
            raise type(error)(
                f"{error}\n\ntnt_kernels: there is a C++ compiler, but it failed: see above. "
                "TNT_KERNELS_SKIP_CPU_BUILD=1 installs without native kernels."
            ) from error
        self.built = {
            "instruction_sets": [*isas],
            "openmp": bool(openmp),
            "sanitize": sanitize,
            "cuda_missing": cuda_missing,
            "cuda_architectures": architectures.replace(";", " ").split() if home else [],
        }

    def find_cuda(self):
        """Where CUDA is, and why it is left out otherwise."""
        if is_set("TNT_KERNELS_SKIP_CUDA_BUILD"):
            return None, "TNT_KERNELS_SKIP_CUDA_BUILD was set at installation"
        home = cuda_home()
        if home:
            return home, ""
        missing = "no nvcc at installation (CUDA_HOME, PATH, /usr/local/cuda)"
        if is_set("TNT_KERNELS_FORCE_CUDA_BUILD"):
            raise CompileError(f"TNT_KERNELS_FORCE_CUDA_BUILD is set, but there is {missing}")
        return None, missing

    def compression(self, home):
        known = subprocess.run([f"{home}/bin/nvcc", "--help"], capture_output=True, check=False)
        return SMALLEST if b"-compress-mode" in known.stdout else SMALL

    def compile_cuda(self, home, gencode, source):
        target = Path(self.build_temp, "cuda", f"{source.stem}.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [f"{home}/bin/nvcc", *NVCC_FLAGS, *gencode, "-Icsrc"]
        command += ["-c", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        target.with_suffix(".ptxas.log").write_text(result.stderr)
        if result.returncode:
            raise CompileError(
                f"{' '.join(command)}\n{result.stdout}{result.stderr}\n"
                "TNT_KERNELS_SKIP_CUDA_BUILD=1 builds the CPU kernels alone."
            )
        return str(target)

    def compile(self, job):
        import pybind11  # here, because an installation of the Python part alone can do without

        directory = os.path.join(self.build_temp, job.name)
        includes = ["csrc", pybind11.get_include(), *self.include_dirs]
        return self.compiler.compile(
            [job.source], directory, job.defines, includes, extra_postargs=job.flags
        )[0]

    def link(self, objects, path, flags):
        flags = ["-fno-fast-math", *flags]
        self.compiler.link_shared_object(objects, path, extra_postargs=flags, target_lang="c++")

    def works(self, source, flags):  # whether it compiles and links
        with tempfile.TemporaryDirectory() as scratch:
            probe = Path(scratch, "probe.cpp")
            probe.write_text(source)
            try:
                objects = self.compiler.compile([str(probe)], scratch, extra_postargs=flags)
                self.link(objects, f"{scratch}/probe.so", flags)
            except (CompileError, LinkError):
                return False
        return True


setup(
    ext_modules=[Extension("tnt_kernels._C", ["csrc/bind.cpp", "csrc/cpu/rows.cpp"])],
    cmdclass={"build_ext": BuildNative},
)
