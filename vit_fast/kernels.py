"""Makes the Triton kernels importable as ``vit_fast.kernels.<operation>``, wherever they lie on disk.

In a wheel they are installed beside this file; in a checkout, and in an editable install, they lie in ``kernels/`` one level
up. A module with a ``__path__`` is a package to the import system. The folder has no ``__init__.py`` on purpose: it must never
hide the package named ``kernels`` that Hugging Face publishes.
"""

from pathlib import Path

_MARKER = "vit_fast.kernels"  # the first line of kernels/README.md: this folder is ours, not somebody else's `kernels`


def _is_ours(folder: Path) -> bool:
    readme = folder / "README.md"
    return readme.is_file() and _MARKER in readme.read_text(encoding="utf-8").partition("\n")[0]


# Launch configurations that were measured best on this machine (`vit_fast.tuning`): {(function, argument, …): configuration}.
# The kernels' own choices count where nothing stands here.
launches: dict[tuple, list | dict] = {}

_here = Path(__file__).resolve().parent
__path__ = [str(folder) for folder in (_here / "kernels", _here.parent / "kernels") if _is_ours(folder)][:1]

if not __path__:
    raise ModuleNotFoundError(f"vit_fast.kernels: no kernel folder of ours beside {_here} or one level up", name=__name__)
