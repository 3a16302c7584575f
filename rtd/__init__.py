"""Random Teachers are Good Teachers (Sarnthein et al., ICML 2023): a small reference implementation.

Each module explains one idea of the paper and can be read, or copied, alone; the ``run_*.py`` scripts beside this
package tell the experiments from top to bottom.
"""

import sys

import torch

__version__ = "0.2.0"

try:
    import torchvision  # noqa: F401
except Exception as error:  # missing, or built for another torch: then its operators fail in one way or another
    reason = " ".join(str(error).split())[:120]
    print(
        f"rtd: error: torchvision does not work with the installed torch {torch.__version__} ({reason}): install the two that "
        "belong together, by pip install --upgrade torch torchvision",
        file=sys.stderr,
    )
    raise SystemExit(2) from None
