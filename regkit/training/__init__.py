"""Training: settings as data, what a run learns from, what it minimises, the loop, evaluation.

`recipes` holds the settings, `data` the images that a recipe asks for, `tasks` what a run learns
from and how it is judged, `objective` what it minimises, `loop` the training itself, `checkpoints`
the folder of a run, `evaluation` the metrics over pairs, and `held_out` measures trained weights on
pairs that they have not seen.

`train` needs the extra "train" (Accelerate and TensorBoard); everything else does not.
"""

from regkit.training.evaluation import evaluate, summary
from regkit.training.loop import Trained, train
from regkit.training.recipes import Recipe, budget

__all__ = ["Recipe", "Trained", "budget", "evaluate", "summary", "train"]
