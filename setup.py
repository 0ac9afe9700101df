"""Builds ``tnt_kernels._C``. Everything that is static stands in pyproject.toml.

``csrc/row_cpu.cpp`` is compiled once per instruction set, ``csrc/bind.cpp`` once, and the lot is
linked against nothing but the C++ and OpenMP runtimes: one build serves every torch. Environment:

    MAX_JOBS                      compilers at a time; default: one per CPU
    CXX, CXXFLAGS                 the compiler, and flags that go before ours
    TNT_KERNELS_SANITIZE          "address,undefined": an instrumented build, see `make sanitize`
    TNT_KERNELS_SKIP_CPU_BUILD=1  install the Python part alone

Without a C++ compiler, too, the Python part is installed alone, and ``tnt-kernels info`` says so.
A compiler that is there and fails is an error.
"""

import json
import os
import shutil
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
# -ffp-contract=off: csrc/row_math.h writes out where it fuses, or p = q would not give exactly 0.
CXX_FLAGS = """-std=c++17 -O3 -fno-fast-math -fno-math-errno -fno-trapping-math -ffp-contract=off
    -fvisibility=hidden -fno-semantic-interposition -g0
    -Wall -Wextra -Werror=return-type -Werror=uninitialized -Werror=format""".split()

# Beyond "baseline", best last.
INSTRUCTION_SETS = {
    "avx2": "-mavx2 -mfma -mf16c -mbmi -mbmi2".split(),
    "avx512": """-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512
        -mavx2 -mfma -mf16c -mbmi -mbmi2""".split(),
}


class Job(NamedTuple):
    source: str
    name: str  # of the object file: a source may be compiled more than once
    defines: list[tuple[str, str]]
    flags: list[str]


class BuildNative(build_ext):
    def initialize_options(self):
        super().initialize_options()
        self.missing, self.built = "", {}  # why there is no _C, or facts of it: _build_info.json

    def run(self):
        if os.environ.get("TNT_KERNELS_SKIP_CPU_BUILD", "0") not in ("", "0"):
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
        version = ("TNT_VERSION", f'"{self.distribution.get_version()}"')
        jobs = [Job("csrc/bind.cpp", "bind", [version, *have], flags)]
        for name, isa_flags in isas.items():
            jobs.append(Job("csrc/row_cpu.cpp", name, [("TNT_ISA", name)], [*flags, *isa_flags]))

        workers = int(os.environ.get("MAX_JOBS") or self.parallel or os.cpu_count() or 1)
        print(f"tnt_kernels: compiling {', '.join(job.name for job in jobs)}", file=sys.stderr)
        try:
            with ThreadPoolExecutor(workers) as pool:
                objects = list(pool.map(self.compile, jobs))
            # Where torch has its libgomp under another name (wheels before 2.8), -fopenmp maps a
            # second one, but the symbols are still looked up, and found, in torch's first.
            self.link(objects, self.get_ext_fullpath(ext.name), [*openmp, *instrument])
        except (CompileError, LinkError) as error:
            raise type(error)(
                f"{error}\n\ntnt_kernels: there is a C++ compiler, but it failed: see above. "
                "TNT_KERNELS_SKIP_CPU_BUILD=1 installs without native kernels."
            ) from error
        self.built = {"instruction_sets": [*isas], "openmp": bool(openmp), "sanitize": sanitize}

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
    ext_modules=[Extension("tnt_kernels._C", ["csrc/bind.cpp", "csrc/row_cpu.cpp"])],
    cmdclass={"build_ext": BuildNative},
)
