"""The tiny world: a synthetic internet whose questions have right answers, so that learning can be judged.

    judge        what an answer is worth (gold), and the annotator who compares two of them
    build        makes the texts in tiny/: `python -m data.world.build`
    facts        what is true there; constitution.json: its principles
"""
from data.world.judge import (FAMILIES, HERE, TINY, Annotator, annotate, annotator_of, choice_probability,
                              gold, judge, knows, mean_scores, rows, step_values)
