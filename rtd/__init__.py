"""Random Teachers are Good Teachers (Sarnthein et al., ICML 2023), a small implementation.

Each module explains one idea of the paper and can be read alone. The scripts ``run_*.py`` beside
this package tell the experiments from top to bottom; ``rtd.harness`` is what carries a run.
"""

from rtd.harness.checkpoint import load_checkpoint, load_network
from rtd.init import init_student_, random_stream
from rtd.losses import cross_entropy, kl_divergence
from rtd.models import random_network
from rtd.probes import extract_features, knn_probe, linear_probe

__all__ = [
    "cross_entropy",
    "extract_features",
    "init_student_",
    "kl_divergence",
    "knn_probe",
    "linear_probe",
    "load_checkpoint",
    "load_network",
    "random_network",
    "random_stream",
]
__version__ = "0.2.0"
