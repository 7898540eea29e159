"""What people are asked: actively selected questions, and a few that measure annotators and the policy."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from deep_rlhf.feedback.loop.config import SessionConfig
from deep_rlhf.feedback.questions.acquisition import select
from deep_rlhf.feedback.questions.candidates import (
    Candidate,
    Generate,
    Prompts,
    rewards_of,
    sample_candidates,
    win_rate_pairs,
)
from deep_rlhf.feedback.questions.gold import read_gold
from deep_rlhf.feedback.records import FOR_LABEL, Comparison, Label, Reason
from deep_rlhf.feedback.state import QUESTION_CURSOR, QuestionCursor
from deep_rlhf.feedback.store import Store
from deep_rlhf.types import Scorer

LABELS_BEFORE_REPEAT = 10  # labels that must follow a label before its question is repeated
ACTIVE_WINDOW = 100  # who gave one of the newest labels counts as active
QUESTIONS_PER_PERSON = 3  # to keep waiting for each active annotator


@dataclass(frozen=True, slots=True, kw_only=True)
class CurrentModels:
    """The models that questions are about, and their versions."""

    generate: Generate  # the policy
    generate_start: Generate  # the start policy
    scorer: Scorer | None  # the reward model in log-odds; None before there is one
    policy_version: int
    reward_version: int


class Questions:
    """Adds questions to the store, and keeps its position there, so that a restarted loop asks nothing twice."""

    def __init__(self, config: SessionConfig, store: Store, prompts: Sequence[str], held_out: Sequence[str]) -> None:
        """`held_out`: prompts of blind pairs. Raises DataError if the gold questions cannot be read."""
        self.config, self.store = config, store
        self._prompts = Prompts(prompts, seed=config.seed)
        self._held_out = Prompts(held_out, seed=config.seed + 1) if held_out else None
        self._gold = read_gold(config.gold_questions) if config.gold_questions else []
        self._labels: list[Label] = []
        self._repeated: set[int] = set()  # ids of questions that were repeated
        self._restore(QUESTION_CURSOR.read(store) or QuestionCursor())

    def _restore(self, cursor: QuestionCursor) -> None:
        self._draws, self._gold_asked = cursor.draws, cursor.gold
        self._prompts.position = cursor.prompts
        if self._held_out:
            self._held_out.position = cursor.held_out

    def _save_cursor(self) -> None:
        held_out = self._held_out.position if self._held_out else 0
        prompts = self._prompts.position
        cursor = QuestionCursor(draws=self._draws, gold=self._gold_asked, prompts=prompts, held_out=held_out)
        QUESTION_CURSOR.write(self.store, cursor)

    def missing(self, wanted: int | None) -> int:
        """How many more questions to add now; `wanted` is the number of labels still wanted, None for no limit.

        Only questions that nobody has seen count as waiting: the others may be of no use to the people who are active,
        who have skipped them, or answered them while a second person is awaited.
        """
        self._labels += self.store.labels(after=self._labels[-1].event_id if self._labels else 0)
        ahead = max(self.config.questions_ahead, QUESTIONS_PER_PERSON * len(self._active_annotators()))
        ahead = ahead if wanted is None else min(ahead, wanted)
        return max(0, ahead - self.store.unseen())

    def ask(self, count: int, models: CurrentModels) -> list[int]:
        """Adds `count` questions to the store (fewer if sampled responses are all equal) and returns their ids."""
        self._draws += 1
        rng = random.Random(f"{self.config.seed}/questions/{self._draws}")
        kinds = [self._kind(rng, models) for _ in range(count)]
        asked = self._win_rate_questions(kinds.count("win_rate"), models, rng)
        asked += self._repeats(kinds.count("repeat"), models)
        asked += self._gold_questions(kinds.count("gold"), models)
        asked += self._label_questions(count - len(asked), models, rng)
        rng.shuffle(asked)
        self._save_cursor()
        return self.store.add(asked)

    def _kind(self, rng: random.Random, models: CurrentModels) -> str:
        """Drawn at random, so that the shares are right however few questions are asked at a time."""
        config, draw = self.config, rng.random()
        shares = {
            "gold": config.gold_share if self._gold_asked < len(self._gold) else 0.0,
            "repeat": config.repeat_share,
            "win_rate": config.win_rate_share if models.policy_version > 0 and self._held_out else 0.0,
        }
        for kind, share in shares.items():
            if draw < share:
                return kind
            draw -= share
        return "label"

    def _label_questions(self, count: int, models: CurrentModels, rng: random.Random) -> list[Comparison]:
        """Questions whose labels the reward model learns from."""
        if count == 0:
            return []
        config, responses = self.config, self.config.ranked_responses
        at_random = models.scorer is None or config.choose_by == "random"  # then more samples would be wasted
        groups = sample_candidates(
            models.generate,
            self._prompts.next(count),
            samples=responses if at_random else config.samples_per_prompt,
            responses=responses,
            seed=self._next_seed(),
        )
        if models.scorer is None:
            return [self._question(group[0], models, "initial", None, rng) for group in groups if group]
        candidates = [candidate for group in groups for candidate in group]
        if not candidates:
            return []
        selected = select(
            rewards_of(candidates, models.scorer),
            count,
            rule=config.choose_by,
            random_share=config.random_share,
            generator=torch.Generator().manual_seed(self._next_seed()),
            label_noise=config.label_noise,
        )
        is_pair = responses == 2
        return [
            self._question(candidates[one.index], models, one.reason, one.predicted if is_pair else None, rng)
            for one in selected
        ]

    def _question(
        self, candidate: Candidate, models: CurrentModels, reason: Reason, predicted: float | None, rng: random.Random
    ) -> Comparison:
        overlaps = len(self._active_annotators()) > 1 and rng.random() < self.config.overlap_share
        return Comparison(
            prompt=candidate.prompt,
            responses=candidate.responses,
            why_selected=reason,
            policy_version=models.policy_version,
            reward_version=models.reward_version,
            predicted=predicted,
            priority=float(models.policy_version),
            overlap=2 if overlaps else 1,
        )

    def _win_rate_questions(self, count: int, models: CurrentModels, rng: random.Random) -> list[Comparison]:
        """Blind pairs: the policy against the start policy on held-out prompts, on random sides."""
        if count == 0 or self._held_out is None:
            return []
        prompts, found = self._held_out.next(count), []
        pairs = win_rate_pairs(models.generate, models.generate_start, prompts, seed=self._next_seed())
        for prompt, now, start in pairs:
            pair = [(now, models.policy_version), (start, 0)]
            rng.shuffle(pair)
            found.append(
                Comparison(
                    prompt=prompt,
                    responses=tuple(text for text, _ in pair),
                    why_selected="win_rate",
                    policy_version=models.policy_version,
                    reward_version=models.reward_version,
                    writers=tuple(version for _, version in pair),
                    priority=float(models.policy_version),
                )
            )
        return found

    def _gold_questions(self, count: int, models: CurrentModels) -> list[Comparison]:
        """The next gold questions, with the priority of questions about the current policy."""
        gold = self._gold[self._gold_asked : self._gold_asked + count]
        self._gold_asked += len(gold)
        return [replace(question, priority=float(models.policy_version)) for question in gold]

    def _repeats(self, count: int, models: CurrentModels) -> list[Comparison]:
        """Earlier questions of active annotators, with the responses in reverse order."""
        self._repeated |= {label.comparison.repeat_of for label in self._labels if label.comparison.repeat_of}
        active = self._active_annotators()
        known = [
            label
            for label in self._local_labels()[:-LABELS_BEFORE_REPEAT]
            if label.choice in ("a", "b", "tie")
            and label.annotator in active
            and label.comparison.why_selected in FOR_LABEL
            and label.comparison_id not in self._repeated
        ]
        drawn = random.Random(self._next_seed()).sample(known, min(count, len(known)))
        self._repeated |= {label.comparison_id for label in drawn}
        return [
            Comparison(
                prompt=label.comparison.prompt,
                responses=label.comparison.responses[::-1],
                why_selected="repeat",
                policy_version=label.comparison.policy_version,
                reward_version=label.comparison.reward_version,
                priority=float(models.policy_version),
                repeat_of=label.comparison_id,
            )
            for label in drawn
        ]

    def _active_annotators(self) -> set[str]:
        return {label.annotator for label in self._local_labels()[-ACTIVE_WINDOW:]}

    def _local_labels(self) -> list[Label]:
        """Labels given here; the annotators of imported labels are not present."""
        return [label for label in self._labels if not label.imported]

    def _next_seed(self) -> int:
        """Another seed for each use, unlikely to be near the seeds of the updates."""
        self._draws += 1
        return (self.config.seed * 7_368_787 + self._draws * 15_485_863 + 2**31) % 2**32
