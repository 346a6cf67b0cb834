"""Tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) under any cache policy, eviction included.

Tasks that score given text (multiple choice, perplexity) are computed teacher-forced. Tasks that generate text need the
engine: serve the model with ``dmc serve`` and use lm-eval's ``local-completions``.
"""

from typing import Any, NoReturn, Optional

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron.dmc.evaluation.policies import CachePolicy
from megatron.dmc.evaluation.tasks import Figure
from megatron.dmc.evaluation.teacher_forced import TeacherForced
from megatron.dmc.training.tokenizer import Tokenizer


class PolicyLM(TemplateLM):
    """Model for lm-eval: :class:`TeacherForced` under a policy.

    Under the model's own policy, results equal those of lm-eval's ``--model hf`` up to rounding: BOS, the longest
    sequence and the windows of rolling tasks follow ``HFLM`` of lm-eval 0.4.13.

    Args:
        batch: sequences at once, of one length.
        add_bos_token: put BOS before every text, as ``add_bos_token`` in lm-eval's ``--model_args`` does; None: when
            the tokenizer does so by itself.

    Raises:
        ValueError: ``add_bos_token`` with a tokenizer that has no BOS.
    """

    def __init__(
        self,
        model: TeacherForced,
        policy: Optional[CachePolicy],
        text: Tokenizer,
        batch: int = 8,
        add_bos_token: Optional[bool] = None,
    ) -> None:
        super().__init__()
        if add_bos_token and text.bos_id is None:
            raise ValueError(f"add_bos_token: tokenizer {text.path} has no BOS token; leave it out")
        self.model, self.policy, self.text, self.batch = model, policy, text, batch
        self.add_bos_token = text.adds_bos if add_bos_token is None else add_bos_token
        self.longest = model.info.model.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self.text.eod_id

    @property
    def prefix_token_id(self) -> int:
        return self.text.eod_id if self.text.bos_id is None else self.text.bos_id

    def tok_encode(self, string: str, add_special_tokens: Optional[bool] = None, **kwargs: Any) -> list[int]:
        adds_bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and (prefix := self.text.decode([self.prefix_token_id])):
            adds_bos = adds_bos and not string.startswith(prefix)
        bos = [self.text.bos_id] if adds_bos and self.text.bos_id is not None else []
        return [*bos, *self.text.encode(string)]

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's continuation in nats, and whether greedy decoding gives it.

        A request of more tokens than the model's context length and one, the last of which is only predicted, loses its
        beginning.

        Args:
            requests: (unused, context ids, continuation ids) each.
        """
        # By length, so that nothing is padded: a policy's budget may depend on the length.
        lengths: dict[int, list[int]] = {}
        rows = [(*context, *continuation)[-self.longest - 1 :] for _, context, continuation in requests]
        for i, row in enumerate(rows):
            lengths.setdefault(len(row), []).append(i)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for members in lengths.values():
            tokens = torch.tensor([rows[i] for i in members])
            scored = self.model.score_next(tokens[:, :-1], tokens[:, 1:], self.policy, self.batch)
            for at, i in enumerate(members):
                n = min(len(requests[i][2]), len(rows[i]) - 1)
                if n:
                    results[i] = float(scored.log_prob[at, -n:].double().sum()), bool(scored.correct[at, -n:].all())
        return results

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        found = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.longest, 1)
            parts = [(None, *make_disjoint_window(pair)) for pair in pairs]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(parts)))
        return found

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> NoReturn:
        raise ValueError(
            "tasks that generate text are not evaluated here; serve the model (dmc serve) and use local-completions"
        )


def evaluate(model: PolicyLM, tasks: list[str], include: Optional[str] = None) -> list[Figure]:
    """Run tasks of lm-eval, its own or from the folder ``include``; every metric becomes a figure named by its task.

    Raises:
        ValueError: an unknown task, or one that generates.
    """
    manager = TaskManager(include_path=include)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(
            f"lm-eval knows no task {unknown[0]!r}; name one of its own, or put its YAML file into lm_eval_include"
        )
    found = simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=False)
    assert found is not None
    figures = []
    for task, metrics in found["results"].items():
        n = found["n-samples"][task]["effective"]
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{kind}")
                figures.append(
                    Figure(f"lm-eval {task}", metric, value, n, error if isinstance(error, float) else float("nan"))
                )
    return figures
