"""Builds the extension, as pip's build backend (pyproject.toml) and for setup.py: two shared objects without Python in them.

What is built is decided by ``VIT_FAST_EXT``:

========  ==========================================================================================================
``auto``  (default) CUDA where nvcc is found, no GPU needed; CPU where a C++ compiler is; one line says what, or why not
``off``   nothing
``cpu``   the CPU object, or an error
``cuda``  both objects, or an error
========  ==========================================================================================================

``CXX``, ``CXXFLAGS``, ``LDFLAGS``, ``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS`` and ``DEBUG`` mean what they mean to
torch's own builds.

Only torch's headers are needed, those of its stable ABI: torch is not imported. They are looked for where torch is
installed for this Python, even when pip builds in isolation; only where there are none does an isolated build fetch torch.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension
from setuptools.build_meta import *  # noqa: F403  (the backend is setuptools', less what stands at the end of this file)
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
STABLE_ABI = "0x020b000000000000"  # torch 2.11, the oldest that the objects serve
HOST_SOURCES = ("ops.cpp", "cpu.cpp", "launch.cpp", "layer_norm.cpp", "linear.cpp", "patch_embed.cpp", "attention.cpp")
X86_SETS = {
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512",
}
CUDA_SOURCES = ("gelu.cu", "layer_norm.cu", "linear.cu", "patch_embed.cu")
CUDA_ARCHITECTURES = "8.0;9.0a;10.0a;12.0"
MODES = ("auto", "off", "cpu", "cuda")


class CannotBuild(Exception):
    """Why a part can't be built here, in one line."""


# ---- What is here ---------------------------------------------------------------------------------------------------


def _site_packages() -> list[Path]:
    # pip's isolation takes them off sys.path; sysconfig still knows them.
    paths = [
        *sys.path,
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        *site.getsitepackages(),
        site.getusersitepackages(),
    ]
    return [Path(path) for path in dict.fromkeys(paths) if path]


def find_torch() -> Path:
    """The folder of an installed torch."""
    for path in _site_packages():
        if (path / "torch/include/torch/csrc/stable/library.h").is_file():
            return path / "torch"
    raise CannotBuild("no torch with a stable ABI (2.11 or newer) is installed")


def find_compiler() -> list[str]:
    """The C++ compiler's command, after it has compiled what the sources are made of."""
    if platform.system() == "Windows":
        raise CannotBuild("the sources need GCC's or Clang's vector types, which Windows' compiler lacks")
    named = os.environ.get("CXX")
    for command in [named] if named else ("c++", "g++", "clang++"):
        words = shlex.split(command)
        if shutil.which(words[0]) is None:
            continue
        probe = (
            "#include <optional>\n"
            "typedef float v __attribute__((vector_size(16)));\n"
            "template <int... i> v pick(v a, v b) { return __builtin_shufflevector(a, b, i...); }\n"
            "v f(v a, v b) { return a < b ? pick<0, 4, 1, 5>(a, b) : b; }\n"
        )
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(probe)
            run = subprocess.run(
                [*words, "-std=c++20", "-c", str(source), "-o", f"{folder}/probe.o"], capture_output=True, text=True
            )
        if run.returncode == 0:
            return words
        raise CannotBuild(f"{command} can't compile C++20 with vector types (GCC 12 or Clang 15 can)")
    raise CannotBuild(f"no C++ compiler: {named} not found" if named else "no C++ compiler: install g++ or clang++, or set CXX")


def find_ninja() -> str:
    found = shutil.which("ninja")
    if found is None and importlib.util.find_spec("ninja") is not None:
        import ninja

        found = shutil.which("ninja", path=ninja.BIN_DIR)
    if found is None:
        raise CannotBuild("ninja is not installed")
    return found


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if found is None:
        raise CannotBuild(f"no nvcc in CUDA_HOME={home}" if home else "no nvcc: install the CUDA toolkit, or set CUDA_HOME")
    return found


def nvcc_architectures(nvcc: str) -> list[str]:
    """Those of CUDA_ARCHITECTURES that this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    known = {code.removeprefix("sm_") for code in listed.stdout.split()} if listed.returncode == 0 else set()
    wanted = CUDA_ARCHITECTURES.split(";")
    found = [one for one in wanted if one.replace(".", "").removesuffix("a") in known]
    if not found:
        raise CannotBuild(f"{nvcc} compiles for none of {', '.join(wanted)} (CUDA 12.8 and newer for all)")
    return found


def toolkit_of(nvcc: str) -> Path:
    """The toolkit's folder. The nvcc on PATH may be a script that calls another: it tells itself where it is."""
    told = subprocess.run([nvcc, "-dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], capture_output=True, text=True)
    for line in told.stderr.splitlines():
        name, _, path = line.removeprefix("#$ ").partition("=")
        if name == "TOP":
            return Path(path.strip()).resolve()
    return Path(nvcc).resolve().parents[1]


def find_cublas(nvcc: str) -> Path:
    """The folder of cublasLt.h: not part of a bare nvcc, but of every CUDA build of torch's dependencies."""
    folders = [toolkit_of(nvcc) / "include"]
    for path in _site_packages():
        folders += [*sorted(path.glob("nvidia/cu*/include")), path / "nvidia/cublas/include"]
    for folder in folders:
        if (folder / "cublasLt.h").is_file():
            return folder
    raise CannotBuild("nvcc is here but cublasLt.h is not: install the CUDA toolkit's cuBLAS, or the package nvidia-cublas")


# ---- What is built --------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Which objects are built with which tools; what is not, and why."""

    mode: str
    compiler: list[str] = field(default_factory=list)
    ninja: str = ""
    torch: Path | None = None
    nvcc: str = ""
    cublas: Path | None = None
    architectures: list[str] = field(default_factory=list)  # as TORCH_CUDA_ARCH_LIST names them
    devices: tuple[str, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)

    def says(self) -> str:
        told = f"extension for {' and '.join(self.devices)}" if self.devices else "no extension"
        return f"vit_fast: {told}" + "".join(f"; not for {device}: {reason}" for device, reason in self.reasons.items())


def make_plan() -> Plan:
    """What ``VIT_FAST_EXT`` asks for and this machine can build. SystemExit where a part was asked for by name and can't be."""
    plan = Plan(os.environ.get("VIT_FAST_EXT", "auto"))
    if plan.mode not in MODES:
        raise SystemExit(f"vit_fast: VIT_FAST_EXT must be one of {', '.join(MODES)}, got {plan.mode!r}")
    if plan.mode == "off":
        return plan
    try:
        plan.compiler, plan.ninja, plan.torch = find_compiler(), find_ninja(), find_torch()
        plan.devices = ("cpu",)
    except CannotBuild as reason:
        plan.reasons["cpu"] = str(reason)
    if plan.devices and plan.mode != "cpu":
        try:
            plan.nvcc = find_nvcc()
            plan.cublas = find_cublas(plan.nvcc)
            plan.architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
            plan.architectures = [one for one in plan.architectures if one] or nvcc_architectures(plan.nvcc)
            plan.devices = ("cpu", "cuda")
        except CannotBuild as reason:
            plan.reasons["cuda"] = str(reason)
    if plan.reasons and plan.mode != "auto":
        raise SystemExit(f"vit_fast: VIT_FAST_EXT={plan.mode}, but {'; '.join(plan.reasons.values())}")
    return plan


FILE_NAMES = f"-ffile-prefix-map={HERE}=csrc"  # in messages, and the same object wherever it is built


def host_flags(torch: Path) -> list[str]:
    debug = os.environ.get("DEBUG", "0") not in ("", "0")
    flags = [
        "-std=c++20",
        *(["-O0", "-g"] if debug else ["-O3"]),
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
        FILE_NAMES,
    ]
    flags += [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-isystem", str(torch / "include")]
    return flags + shlex.split(os.environ.get("CXXFLAGS", ""))


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _architecture_flags(architectures: list[str]) -> list[str]:
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _ninja_text(text: str | Path) -> str:
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(plan: Plan, device: str, target: Path) -> str:
    """The build of one object, as ninja reads it. Paths of objects are relative to where ninja runs."""
    assert plan.torch is not None
    lines = ["ninja_required_version = 1.5", "builddir = .", f"flags = {shlex.join(host_flags(plan.torch))}"]
    objects = []

    def compile_with(rule: str, source: str, name: str, more: str = "") -> None:
        objects.append(f"{name}.o")
        lines.append(f"build {name}.o: {rule} {_ninja_text(HERE / source)}\n  more = {more}")

    cxx = shlex.join(plan.compiler)
    lines.append(f"rule cxx\n  command = {cxx} -MMD -MF $out.d $flags $more -c $in -o $out\n  depfile = $out.d\n  deps = gcc")
    if device == "cpu":
        sets = {"portable": "", **(X86_SETS if _is_x86() else {})}
        for name, flags in sets.items():
            compile_with("cxx", "isa.cpp", f"isa_{name}", f"-fno-exceptions -fno-rtti -DVIT_FAST_ISA={name} {flags}")
        for source in HOST_SOURCES:
            compile_with("cxx", source, Path(source).stem, "-DVIT_FAST_X86" if _is_x86() else "")
        link = f"{cxx} -shared -Wl,--no-as-needed"
    else:
        assert plan.cublas is not None
        nvcc = shlex.join([plan.nvcc, "-ccbin", plan.compiler[0]])
        options = ["-std=c++20", "-O3", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
        options += ["-isystem", str(plan.torch / "include"), "-isystem", str(plan.cublas)]
        options += ["-Xcompiler", f"-fPIC,-fvisibility=hidden,{FILE_NAMES}", *_architecture_flags(plan.architectures)]
        command = f"{nvcc} {shlex.join(options)} -MD -MF $out.d -c $in -o $out"
        lines.append(f"rule nvcc\n  command = {command}\n  depfile = $out.d\n  deps = gcc")
        for source in CUDA_SOURCES:
            compile_with("nvcc", source, Path(source).stem)
        # nvcc knows where its runtime is, which goes in. cuBLASLt comes with the torch that loads this object: its symbols stay
        # open until then.
        link = f"{nvcc} -shared -cudart static -nodlink -forward-unknown-to-host-compiler -Wl,--no-as-needed"
    link += f" -o $out $in -L{shlex.quote(str(plan.torch / 'lib'))} -ltorch -ltorch_cpu -lc10 {os.environ.get('LDFLAGS', '')}"
    lines.append(f"rule link\n  command = {link}")
    lines.append(f"build {_ninja_text(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def build_object(plan: Plan, device: str, target: Path, folder: Path) -> None:
    """Compile and link one object; what is up to date in the folder is kept. CalledProcessError with ninja's output shown."""
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(plan, device, target.resolve()))
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    subprocess.run([plan.ninja, "-C", str(folder), "-j", jobs], check=True)


# ---- setuptools -----------------------------------------------------------------------------------------------------


class BuildExtension(build_ext):
    """Builds the plan's objects as files of the package: what torch loads, not what Python imports."""

    plan: Plan

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        device = ext.name.rpartition("_")[2]
        folder = Path(self.build_temp).resolve() / f"vit_fast_{device}"
        try:
            build_object(self.plan, device, Path(self.get_ext_fullpath(ext.name)), folder)
        except subprocess.CalledProcessError as error:
            if not ext.optional:
                raise SystemExit(
                    f"vit_fast: VIT_FAST_EXT={self.plan.mode}, but the {device} object does not compile"
                ) from error
            print(f"vit_fast: no extension for {device}: it does not compile (see above)", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: compiled, but for every Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not self.distribution.ext_modules

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])


def extension_arguments() -> dict:
    """What setup() needs to build the extension: nothing to build where the plan says so."""
    plan = make_plan()
    print(plan.says(), file=sys.stderr)
    extensions = [Extension(f"vit_fast.libvit_fast_{device}", [], optional=plan.mode == "auto") for device in plan.devices]
    commands = {"build_ext": type("build_ext", (BuildExtension,), {"plan": plan}), "bdist_wheel": PlatformWheel}
    return {"ext_modules": extensions, "cmdclass": commands}


# ---- pip's build backend --------------------------------------------------------------------------------------------


def _requires() -> list[str]:
    """What an isolated build has to fetch: torch, for its headers, where none is installed and something can be built."""
    if os.environ.get("VIT_FAST_EXT", "auto") == "off":
        return []
    try:
        find_compiler()
    except CannotBuild:
        return []  # make_plan tells
    try:
        find_torch()
    except CannotBuild:
        return ["torch>=2.11"]
    return []


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return _requires()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return _requires()


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    return []
