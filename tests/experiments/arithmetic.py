"""A reward that can be checked (RLVR), on a real model: the last number of an arithmetic word problem.

    python tests/experiments/arithmetic.py problems.jsonl          makes 600 problems
    python ppo.py --init SMOLLM2 --data problems.jsonl --reward tests/experiments/arithmetic.py:score \\
        --advantage grpo --group 8 --rollouts 32 --minibatches 2 --micro_batch 8 --max_prompt 96 \\
        --max_new 48 --lr 2e-5 --kl_coef 0.02 --eos_penalty 0 --out out/arithmetic

Answers end in "#### 12", as those of GSM8K (arXiv:2110.14168) do. SMOLLM2: README, Your own model.
"""
import json
import random
import re
import sys

PROBLEMS = [   # a text with two numbers, and what to do with them
    ("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", "+"),
    ("{name} had {a} {things} and gave {b} of them away. How many {things} are left?", "-"),
    ("{name} has {a} boxes with {b} {things} in each. How many {things} does {name} have?", "*"),
    ("There are {a} {things} on a table and {b} on a shelf. How many {things} are there in all?", "+"),
]
HOW = " Think in one short sentence, then end your answer with #### and the number, for example #### 7"


def score(rows, texts):
    """1 for the right number behind ####, 0.1 for another number there, 0 without one."""
    scores = []
    for row, text in zip(rows, texts):
        found = re.search(r"####\s*(-?\d+)", text.replace(",", ""))
        right = found and int(found[1]) == int(row["answer"].split("####")[-1])
        scores.append(1.0 if right else 0.1 if found else 0.0)
    return scores


def problems(n, seed=0):
    """n rows {"prompt", "answer"} with numbers below 20."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        text, operator = rng.choice(PROBLEMS)
        a, b = sorted(rng.sample(range(2, 20), 2), reverse=True)
        results = {"+": a + b, "-": a - b, "*": a * b}
        question = text.format(name=rng.choice(("Tom", "Ana", "Ravi", "Mei")), a=a, b=b,
                               things=rng.choice(("apples", "books", "coins", "stamps")))
        rows.append({"prompt": question + HOW, "answer": f"#### {results[operator]}"})
    return rows


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    with open(sys.argv[1], "x", encoding="utf-8") as f:      # "x": a file that is there stays
        for row in problems(600):
            f.write(json.dumps(row) + "\n")
