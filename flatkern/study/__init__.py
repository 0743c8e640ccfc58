"""`flatkern study`: what training under noise does to accuracy, and what flatness says of it.

Every cell of the study is one training run of an arm on a task, with one labelling and one seed. A
cell is written when it is done, with its predictions, so that a study goes on where it stopped.
"""


class StudyError(RuntimeError):
    """The study cannot run or go on; the message says what to do."""
