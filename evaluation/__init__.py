"""Evaluation of a trained network by the protocols of Table 3 of the paper: 42 multi-scale crops, and fully-convolutional.

`evaluate` is the function, evaluation/multi_scale.py the script.
"""

from evaluation.checkpoints import Network, load_network
from evaluation.options import PROTOCOLS, TABLE_3_PROTOCOLS, EvaluationOptions
from evaluation.run import evaluate

__all__ = ["PROTOCOLS", "TABLE_3_PROTOCOLS", "EvaluationOptions", "Network", "evaluate", "load_network"]
