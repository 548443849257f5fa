"""One run of a script: the folder it leaves, with lock, log, progress line, save and resume.

    device = setup(cfg)                  seeds, precision, processes (data/setup.py)
    run = Run.open(cfg, "sft", [data])   locks the folder; an unfinished run with the same flags goes on
    run.begin(n_steps, tok, policy=(model, optimizer))
    before, answers = run.before(measure)
    for step in run.steps():
        ...
        run.log(step, loss=..., tokens=...)
        if run.due(step):
            run.save(step)
    run.finish(before, after)
"""
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from data import InputError, report, write_atomic, write_jsonl
from data.chain import NEXT, PART_OF_A_CHAIN, fingerprint, result_of, run_of, sibling
from data.files.checkpoint import finish_save, load_state, save
from data.flags import FREE, given_flags
from data.health import health
from data.parallel import RANK, all_sum, full_state, load_full_state, load_optimizer_state, optimizer_state
from data.setup import MEASURE, seeded

try:
    import fcntl
except ImportError:   # Windows: no lock
    fcntl = None

LEFT_BY_A_RUN = ("state.pt", "log.jsonl", "samples.txt", "answers.jsonl", "result.json", "comparisons.jsonl",
                 "process.jsonl", "held_out.jsonl", "inspect.json")   # beside the checkpoint and run.json


class Run:
    """One run: its folder, log and messages. Files: run.json (flags and inputs), log.jsonl, samples.txt,
    answers.jsonl, the checkpoint with state.pt, result.json (its absence tells an unfinished run)."""

    def __init__(self, cfg, stage, dry=False, begun="state.pt"):
        """The object alone, which touches nothing. Scripts call `open`, where the arguments are described."""
        self.cfg, self.stage, self.folder, self.dry, self.begun = cfg, stage, Path(cfg.out), dry, begun
        self.state, self.first = {}, 0                               # of a checkpoint to go on from
        self.skipped, self.stopping, self.warned = 0, False, set()   # steps, by Ctrl-C, what was warned of
        self.shown, self.line_open, self.history = 0.0, False, []    # the progress line; rows of log.jsonl
        self.start, self.step_seconds = time.time(), []

    @classmethod
    def open(cls, cfg, stage, inputs=(), dry=False, begun="state.pt"):
        """A Run that has the folder cfg.out to itself: locks it, deletes what --overwrite replaces, writes
        run.json, and reads the state that an unfinished run with the same flags left. From here on Ctrl-C
        lets a step end.

        A finished run with the same flags shows its table and ends the program; one with other flags is an
        InputError. inputs: files and folders that the plan and what is kept between steps depend on. dry:
        only look (ppo.py --inspect): take the first steps of such a run, and write nothing. begun: the file
        that tells that a run has begun."""
        run = cls(cfg, stage, dry, begun)
        flags = {name: value for name, value in asdict(cfg).items() if name not in FREE}
        if begun != "state.pt":      # a run of several scripts: where one of them stops, others begin
            flags["max_steps"] = cfg.max_steps
        record = {"stage": stage, "config": asdict(cfg), "flags": flags,
                  "inputs": {str(path): fingerprint(path) for path in inputs}}
        # The first process looks. Where it ends, the others end too: 1 stands for success, 2 for an error.
        ends = 0
        try:
            if RANK == 0 and not dry:
                run.open_folder(record)
        except BaseException as e:
            ends = 1 if isinstance(e, SystemExit) else 2
            raise
        finally:
            ends = all_sum(ends)
        if ends:
            sys.exit(int(ends) - 1)
        run.state = {} if dry else load_state(run.folder)
        run.first = run.state.get("step", 0)
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, run.stop)
        return run

    def open_folder(self, record):
        """Lock the folder and make it ready. Ends the program if the run is finished; InputError if it may
        not begin."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock()
        finish_save(self.folder)      # a save that was cut off after its commit still counts
        goes_on = self.what_is_there(record)
        replaced = [self.folder / name for name in (["result.json"] if goes_on else LEFT_BY_A_RUN)]
        read = {Path(path).resolve() for path in record["inputs"]}
        for path in replaced:
            if path.resolve() in read:
                raise InputError(f"{path} is read by this run and would be replaced by it; choose another "
                                 "--out")
        for path in replaced:
            path.unlink(missing_ok=True)
        write_atomic(self.folder / "run.json", json.dumps(record, indent=1).encode())

    def lock(self):
        """InputError if another run is writing here. The system lets go of the lock when this process
        ends."""
        self.lock_file = open(self.folder / ".lock", "w")
        if fcntl is None:
            return
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder}: another run is writing there; choose another --out") from None
        except OSError as e:
            print(f"{self.folder}: no locks here ({e.strerror}); see that no other run writes there")

    def what_is_there(self, record):
        """Whether the folder holds an unfinished run with the same flags. Ends the program if it is
        finished."""
        result, old = result_of(self.folder), run_of(self.folder)
        is_started = (self.folder / self.begun).exists() or bool(result)
        if not is_started or self.cfg.overwrite:
            return False
        other = self.difference(old, record)
        if other:
            raise InputError(f"{self.folder} holds a run of its own ({other}); choose another --out, or "
                             "--overwrite it")
        theirs, ours = result.get("config", {}).get("max_steps", 0), self.cfg.max_steps
        if result and (theirs == 0 or 0 < ours <= theirs):
            print(f"{self.folder} is finished: a run with the same flags took {result['seconds']:.0f} s "
                  "(--overwrite repeats it)")
            print(report.table(result["columns"]))
            sys.exit(0)
        return True

    def difference(self, old, record):
        """What tells two run.json apart, as a phrase; "" if nothing does."""
        if not old:
            return "no run.json says how it was made"
        if old["stage"] != record["stage"]:
            return f"{old['stage']} made it"
        for name, value in record["flags"].items():
            if old["flags"].get(name) != value:
                return f"--{name} was {old['flags'].get(name)!r}, now {value!r}"
        # By content: where a file lies is told by the flags, and the whole folder may have moved since.
        for (path, value), before in zip(record["inputs"].items(), old["inputs"].values()):
            if before != value:
                return f"{path} has changed since"
        return ""

    def stop(self, signum, frame):
        """Ctrl-C or SIGTERM: finish the step and save. A second one ends the run where it is."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        self.say("stopping after this step; once more stops at once")

    def begin(self, n_steps, tok, **trained):
        """trained: name=(model, optimizer) of all that is trained; the first model is the checkpoint in the
        folder. They are given their state if the run goes on."""
        self.n_planned, self.n_steps = n_steps, min(n_steps, self.cfg.max_steps or n_steps)
        self.tok, self.trained = tok, trained
        self.step_start = self.loop_start = time.time()
        if self.first:
            self.load_trained()
        if self.dry:
            # Early, where tokens are clipped; and not the very first, where the KL is still 0.
            self.n_steps = min(3, self.n_steps)
            return
        path = self.folder / "log.jsonl"
        if self.first and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()[: self.first]
            self.history = [json.loads(line) for line in lines]
        if RANK == 0:
            self.log_file = open(path, "w", encoding="utf-8")
            for row in self.history:
                self.write_row(row)
        if self.first:
            self.say(f"{self.folder}: going on after step {self.first}")

    def load_trained(self):
        """Give all that is trained its state in the checkpoint. InputError: that is of other models."""
        for name, (model, optimizer) in self.trained.items():
            wanted = {part for part, p in model.named_parameters() if p.requires_grad}
            if not wanted <= self.state["models"].get(name, {}).keys():
                raise InputError(f"{self.folder}: its run trained {', '.join(self.state['models'])}, and not "
                                 f"the {name} of these flags; give --inspect the flags of that run")
            load_full_state(model, self.state["models"][name])
            load_optimizer_state(model, optimizer, self.state["optimizers"][name])

    def steps(self):
        """The numbers of the steps that are left, from 0 on."""
        self.loop_start = time.time()
        for step in range(self.first, self.n_steps):
            self.step_start = time.time()
            yield step

    def finite(self, norm, model, rows):
        """Whether a step may be taken with this gradient norm. One that is not finite is skipped, said and
        counted, with the examples it came from; the fourth ends the run. rows: their numbers, among
        those trained on."""
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        if norm.isfinite():
            return True
        bad = []
        for name, p in model.named_parameters():
            if p.grad is not None and not p.grad.isfinite().all():
                bad.append(name)
        self.skipped += 1
        place = "has a norm that"      # finite entries, too large to be squared
        if bad:
            place = f"of {bad[0]} and {len(bad) - 1} more tensors"
        what = f"step skipped: the gradient {place} is not finite; examples number {list(rows)[:8]} ..."
        if self.skipped > 3:
            raise InputError(f"{what}. The fourth such step: try a smaller learning rate or --dtype float32")
        self.say(what)
        return False

    def check_finite(self, row_of, **tensors):
        """InputError if an entry of a tensor (B, ..) is not finite. row_of: the number of each one's
        prompt."""
        for name, x in tensors.items():
            good = x.reshape(len(x), -1).isfinite().all(1)
            if not good.all():
                bad = [i for i, fine in zip(row_of, good.tolist()) if not fine]
                raise InputError(f"the {name} is not finite for prompts number {bad[:8]} of those kept; "
                                 "nothing was updated. Look at that model's weights, and try --dtype float32")

    def log(self, step, tokens=0, show=(), done=None, **figures):
        """Record step (from 0), with `tokens` read in it; show the figures named in `show` (default: all) at
        most every few seconds. done: the share of the run that is behind it, where steps differ in length.
        JSON has no NaN; it is left out."""
        seconds = time.time() - self.step_start
        if tokens:
            figures["tok_s"] = tokens / seconds
        if self.skipped:
            figures["skipped"] = self.skipped
        row = {}
        for name, value in figures.items():
            value = float(value)      # waits for the GPU
            if math.isfinite(value):
                row[name] = float(f"{value:.6g}")
        self.history.append({"step": step + 1} | row)
        if self.dry:
            return
        if RANK == 0:
            self.write_row(self.history[-1])
        self.watch_speed(seconds)
        self.warn()
        left = self.n_steps - step - 1
        now, pause = time.time(), 0.2 if sys.stdout.isatty() else 5
        if now - self.shown > pause or left == 0:
            self.shown = now
            if done is None:
                done = (step + 1 - self.first) / (self.n_steps - self.first)
            remaining = (now - self.loop_start) * (1 - done) / done
            shown = {name: row[name] for name in show or row if name in row}
            self.show(step, shown, row.get("tok_s"), remaining)

    def write_row(self, row):
        """Append a row to log.jsonl."""
        self.log_file.write(json.dumps(row) + "\n")
        self.log_file.flush()

    def warn(self):
        """Print each health warning of a PPO run once."""
        if self.stage == "ppo":
            for name, sentence in health(self.history, self.cfg).items():
                if name not in self.warned:
                    self.say(f"health, {name}: {sentence}")
                    self.warned.add(name)

    def show(self, step, figures, speed, seconds_left):
        """The progress line: at most 80 columns, redrawn in place on a terminal."""
        parts = [f"{self.stage} {step + 1}/{self.n_steps}"]
        parts += [f"{name} {value:.3g}" for name, value in figures.items() if name != "tok_s"][:5]
        if speed:
            parts.append(f"{speed:,.0f} tokens/s")
        parts.append(f"{seconds_left // 60:.0f}:{seconds_left % 60:02.0f} left")
        while len(" | ".join(parts)) > 79 and len(parts) > 3:
            del parts[-3]
        line = " | ".join(parts)
        if sys.stdout.isatty():
            print(f"\r{line:79}", end="", flush=True)
            self.line_open = step + 1 < self.n_steps
            if not self.line_open:
                print(flush=True)
        else:
            print(line, flush=True)

    def watch_speed(self, seconds):
        """Say once what to do when steps on the CPU have become several times slower than they were."""
        if any(next(model.parameters()).device.type != "cpu" for model, _ in self.trained.values()):
            return
        self.step_seconds.append(seconds)
        if len(self.step_seconds) < 40 or "speed" in self.warned:
            return
        best = sorted(self.step_seconds)[len(self.step_seconds) // 10]    # the 10th percentile
        now = sorted(self.step_seconds[-10:])[2]                          # the third fastest of the last ten
        if now > 4 * best:
            self.warned.add("speed")
            self.say(f"steps take {now / best:.0f} times as long as before: others use the processor.\n"
                     "Ctrl-C saves; with OMP_NUM_THREADS=1 before the same command it goes on, often faster")

    def say(self, text):
        """Print a line of its own."""
        if self.line_open:
            print()
            self.line_open = False
        print(text, flush=True)

    def due(self, step):
        """Whether a step ends with a checkpoint: every --save_every steps, at the end, and when asked to
        stop."""
        self.stopping = bool(all_sum(self.stopping))   # all ranks or none
        last = step + 1 == self.n_steps
        return not self.dry and ((step + 1) % self.cfg.save_every == 0 or last or self.stopping)

    def save(self, step, **state):
        """Save a checkpoint after a step: models, optimizers, and `state` (tensors, numbers and strings by
        name), which is `self.state` when the run goes on. Ends the program if it was asked to stop."""
        models, optimizers = {}, {}
        for name, (model, optimizer) in self.trained.items():
            models[name] = full_state(model, trained_only=True)
            optimizers[name] = optimizer_state(model, optimizer)
        kept = {name: self.state[name] for name in ("before", "answers") if name in self.state}
        state = kept | state | {"step": step + 1, "models": models, "optimizers": optimizers}
        main_model = next(iter(self.trained.values()))[0]
        save(self.folder, main_model, self.tok, state)
        if self.stopping:
            raise KeyboardInterrupt(f" after step {step + 1}, saved in {self.folder}; this command goes on")

    def before(self, measure):
        """measure("before") -> (figures, Answers): these figures, and the answers as `scored`. They are
        measured now or, if the run goes on, come from the checkpoint, in which `save` keeps them."""
        if not self.first and not self.dry:
            figures, answers = measure("before")
            self.state |= {"before": figures, "answers": answers.scored}
        return self.state.get("before"), self.state.get("answers")

    def measure(self, title, sampler, tests):
        """What a policy's sampling copy says to the test prompts, the same draws whoever asks: figures and
        Answers (report.test_policy). A few of the answers go into samples.txt under the title."""
        figures, answers = report.test_policy(sampler, self.tok, tests, seeded(self.cfg.seed, MEASURE))
        self.samples(title, tests.prompts[: report.N_SAMPLES], answers.texts)
        return figures, answers

    def samples(self, title, prompts, answers):
        """Append the answers (texts) to a few prompts (messages) to samples.txt."""
        if RANK == 0 and not self.dry:
            with open(self.folder / "samples.txt", "a", encoding="utf-8") as f:
                f.write(report.samples_text(title, prompts, answers))

    def finish(self, before, after, columns=None, answers=(), device=None):
        """answers.jsonl, result.json, the closing table (of `columns` if given) and the page. before, after
        and columns: figures by name; answers: rows as report.answer_rows gives them. device: where it ran, if
        nothing was trained."""
        if RANK:
            return
        self.log_file.close()
        speeds = sorted(row["tok_s"] for row in self.history if "tok_s" in row)
        columns = columns or {"before": before, "after": after}
        for model, _ in self.trained.values():
            device = model.wte.weight.device
        result = {"stage": self.stage, "seed": self.cfg.seed, "config": asdict(self.cfg),
                  "seconds": round(time.time() - self.start, 1), "device": str(device),
                  "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
                  "steps": len(self.history), "planned": self.n_planned, "given": given_flags(self.cfg),
                  "before": before, "after": after, "columns": columns}
        write_jsonl(self.folder / "answers.jsonl", answers)
        write_atomic(self.folder / "result.json", json.dumps(result, indent=1).encode())
        if answers and PART_OF_A_CHAIN not in os.environ:
            own_reward = bool(getattr(self.cfg, "reward", ""))
            self.say(report.closing_samples(answers, list(columns), sibling(self.cfg, "base"), own_reward))
            self.say(f"more of them: {self.folder / 'samples.txt'}")
        self.say("\n" + report.table(columns, explained=True))
        runs = {"base": result_of(sibling(self.cfg, "base")), "SFT": result_of(sibling(self.cfg, "sft")),
                list(columns)[-1]: result}
        for title, its_result in runs.items():
            if title in columns and report.cut_short(its_result):
                self.say(f"{title} was cut short: {report.cut_short(its_result)}")
        if PART_OF_A_CHAIN in os.environ:    # the script that asked for this one goes on
            return
        for command in NEXT.get(self.stage, ()):
            self.say(f"next: {command.format(out=self.folder)}")
        self.say(report.write_page(self.folder))
