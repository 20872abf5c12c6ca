"""CUDA's own syntax in csrc/*.cu and *.cuh, turned into C++ for the headers in this folder. What isn't understood is an error.

============================================  =========================================================================
``kernel<T><<<grid, block, 0, stream>>>(a);``  a call of ``emulated::launch``, which also gets the kernel's launch bounds
``__shared__ float sums[8];``                 one static array for all threads: blocks run one after the other
``STABLE_TORCH_LIBRARY_IMPL(…, CUDA, m)``     registered for CPU tensors
cuBLASLt's workspace of 32 MiB                32 KiB: the tests fill what is allocated with NaN, for every product
============================================  =========================================================================

Lines stay where they are: what compilers and sanitizers report is found in the originals.
"""

from __future__ import annotations

import re

_KERNEL = re.compile(r"__global__ void (?:__launch_bounds__\(([^()]*)\) )?(\w+)\(")
_SHARED = re.compile(r"__shared__ (\w+ (\w+)(?:\[[^\[\]]+\])+);")
_REGISTERED = re.compile(r"(STABLE_TORCH_LIBRARY_IMPL\(\w+, )CUDA(, m\))")
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_MOST_THREADS = "1024"
_WORKSPACE = "WORKSPACE = size_t(32) << 20"


class NotUnderstood(Exception):
    """Syntax that this translation doesn't know."""


def translate(text: str, name: str) -> str:
    bounds = {kernel: (given or _MOST_THREADS).split(",")[0] for given, kernel in _KERNEL.findall(text)}
    _expect(len(bounds) == text.count("__global__"), f"{name}: a __global__ that is no kernel's definition")
    text = _SHARED.sub(r"static \1; emulated::fresh(\2);", text)
    _expect("__shared__" not in text, f"{name}: a __shared__ that is no array's definition")
    text, count = _REGISTERED.subn(r"\1CPU\2", text)
    _expect(count == name.endswith(".cu"), f"{name}: registers for CUDA {count} times")
    if name == "cublaslt.cuh":
        _expect(_WORKSPACE in text, f"{name}: no {_WORKSPACE}")
        text = text.replace(_WORKSPACE, _WORKSPACE.replace("20", "10"))
    while (at := text.find("<<<")) >= 0:
        text = _without_launch(text, at, bounds, f"{name}:{text[:at].count(chr(10)) + 1}")
    return f'#line 1 "{name}"\n{text}'


def _without_launch(text: str, at: int, bounds: dict[str, str], where: str) -> str:
    """The text without the launch whose ``<<<`` is there."""
    start = _start_of_kernel(text, at, where)
    kernel = text[start:at]
    name = kernel.partition("<")[0]
    _expect(name in bounds, f"{where}: a launch of {name}, which the file doesn't define")
    _expect(text[:start].rstrip()[-1] in ";{", f"{where}: a launch that is no statement")
    configuration_end = text.find(">>>", at)
    configuration = _split(text[at + 3 : configuration_end])
    _expect(len(configuration) == 4, f"{where}: a launch needs grid, block, shared memory and stream")
    arguments = configuration_end + 3
    end = _closing(text, arguments, where)
    _expect(text[end : end + 2] == ");", f"{where}: a launch ends with );")
    body = f"[&] {{ {kernel}{text[arguments : end + 2]} }}"
    called = ", ".join([f'emulated::launch("{name}"', bounds[name], *configuration, body]) + ");"
    return text[:start] + called + text[end + 2 :]


def _start_of_kernel(text: str, end: int, where: str) -> int:
    """Where ``name<…>`` or ``name`` begins that ends there."""
    start, depth = end, 0
    while depth > 0 or text[start - 1] == ">":
        start -= 1
        _expect(text[start] not in ";{}", f"{where}: a launch whose kernel's name isn't found")
        depth += (text[start] == ">") - (text[start] == "<")
    while re.match(r"\w", text[start - 1]):
        start -= 1
    return start


def _closing(text: str, at: int, where: str) -> int:
    """Where the bracket closes that opens there."""
    _expect(text[at] in _PAIRS, f"{where}: a launch without arguments")
    open_ones = [_PAIRS[text[at]]]
    while open_ones:
        at += 1
        if text[at] in _PAIRS:
            open_ones.append(_PAIRS[text[at]])
        elif text[at] in _PAIRS.values():
            _expect(text[at] == open_ones.pop(), f"{where}: brackets that don't match")
    return at


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in _PAIRS) - (character in _PAIRS.values())
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise NotUnderstood(message)
