"""Random Teachers are Good Teachers (Sarnthein et al., ICML 2023): a small reference implementation.

Each module explains one idea of the paper and can be read, or copied, alone; the ``run_*.py`` scripts beside this
package tell the experiments from top to bottom.
"""

__version__ = "0.1.0"
