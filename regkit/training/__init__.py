"""Training: settings as data, what a run learns from, what it minimises, the loop, evaluation.

`recipes` holds the settings, `tasks` what a run learns from, `objective` what it minimises, `loop`
the training itself, `checkpoints` the folder of a run, `evaluation` the metrics over pairs, and
`held_out` the pairs on which trained weights are measured.
"""

from regkit.training.evaluation import evaluate, summary
from regkit.training.loop import Trained, train
from regkit.training.recipes import Recipe, budget

__all__ = ["Recipe", "Trained", "budget", "evaluate", "summary", "train"]
