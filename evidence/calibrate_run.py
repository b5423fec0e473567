"""The model of a calibration with its hooks, one step a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from adaptc.adapter import Adapter
from adaptc.calibration import Gradient
from adaptc.delta import NeedsBase
from adaptc.errors import FormatError, NeedsError, UnsupportedError, UsageError
from adaptc.evidence.calibrate_request import Request, chosen_layers
from adaptc.evidence.gradients import Importance
from adaptc.evidence.model import Loaded, Task, applied
from adaptc.evidence.moments import Moments
from adaptc.evidence.passages import Batch, Passage
from adaptc.evidence.ready import with_head
from adaptc.lowrank import low_rank


class Run:
    """A loaded model that collects moments, and with gradients importance, from the batches it is given.

    `beside` are the adapter's parameters whose factors gradients are taken at; the rest of it is attached.
    """

    def __init__(self, request: Request, task: Task, loaded: Loaded, adapter: Adapter | None) -> None:
        self.task, self.model = task, loaded.model
        layers = chosen_layers(self.model, request.include, request.exclude)
        self.moments = Moments(layers, request.diagonal)
        self.importance: Importance | None = None
        self.adapter = adapter
        if adapter is not None and request.gradients:
            low = {k: f.factors() for k, d in adapter.deltas.items()
                   if k in layers and not isinstance(d, NeedsBase) and (f := low_rank(d)) is not None}
            if not low:
                raise NeedsError("the adapter has no low-rank factors on the layers that are watched")
            self.importance = Importance(layers, low)
            self.adapter = replace(adapter, deltas={k: d for k, d in adapter.deltas.items() if k not in low})
        head = self.model.get_output_embeddings() if task == "lm" else None
        # Logits are most of a small model's work; without a loss only a head that is watched itself needs them.
        body = task == "lm" and self.importance is None and all(m is not head for m in layers.values())
        self._call = self.model.base_model if body else self.model

    @property
    def gradients(self) -> dict[str, Gradient]:
        """The importance sums so far, {} where none are taken."""
        return {} if self.importance is None else self.importance.sums

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Put adapter and hooks on the model until the end of the block."""
        with ExitStack() as on:
            if self.adapter is not None and (self.adapter.deltas or self.adapter.replaced):
                on.enter_context(applied(self.model, self.adapter))
            if self.importance is not None:
                on.enter_context(self.importance.beside())
            on.enter_context(self.moments.watching())
            yield

    def step(self, batch: Batch, learn: bool) -> None:
        """Run one batch; take gradients from it where they are wanted and it is one to `learn` from.

        Raises UnsupportedError for models that want more than tokens and a mask, FormatError for a tokenizer that does
        not belong to the model.
        """
        learn = learn and self.importance is not None
        extra = {"use_cache": False} if self.task == "lm" else {}
        with self.moments.batch(batch.mask), torch.set_grad_enabled(learn):
            try:
                out = self._call(input_ids=batch.ids, attention_mask=batch.mask.long(), **extra)
            except (TypeError, ValueError) as e:
                raise UnsupportedError(f"{type(self.model).__name__} does not run on text alone ({e})") from e
            except IndexError as e:
                raise FormatError(f"the tokenizer gives token {int(batch.ids.max())}, {type(self.model).__name__} has "
                                  f"{self.model.get_input_embeddings().num_embeddings}") from e
            if learn and self.importance is not None:
                self.importance.step(_loss(out.logits, batch, self.task))


def fitted(adapter: Adapter, loaded: Loaded, gradients: bool) -> Adapter:
    """Return the adapter with its names as this model has them: a bare encoder lacks the task's prefix and head.

    Raises NeedsError where gradients would flow from a classifier that nobody gives values.
    """
    prefix = f"{loaded.model.base_model_prefix}."
    if not hasattr(loaded.model, prefix[:-1]) and all(k.startswith(prefix) for k in adapter.deltas):
        kept = {k.removeprefix(prefix): t for k, t in adapter.replaced.items() if k.startswith(prefix)}
        return replace(adapter, deltas={k.removeprefix(prefix): d for k, d in adapter.deltas.items()}, replaced=kept)
    return with_head("adapter", adapter, loaded.missing, None) if gradients else adapter


def settle_padding(loaded: Loaded, task: Task, window: int) -> int:
    """Return the token that pads batches. Raises UsageError for a window that the model has no positions for."""
    config, tokenizer = loaded.model.config, loaded.tokenizer
    places = getattr(config, "max_position_embeddings", None)
    if isinstance(places, int) and window > places:
        raise UsageError(f"window is {window}, the model has {places} positions")
    pad = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    if task == "classify" and config.pad_token_id is None:
        config.pad_token_id = pad  # classifiers on causal models look for the last token that is no padding
    return pad


def check_labels(passages: Sequence[Passage], loaded: Loaded, task: Task) -> None:
    """Raise FormatError unless a classifier finds a class that it has in every row."""
    classes = int(getattr(loaded.model.config, "num_labels", 0))
    for i, p in enumerate(passages, 1) if task == "classify" else ():
        if p.label is None or not 0 <= p.label < classes:
            said = "no label" if p.label is None else f"label {p.label}"
            raise FormatError(f"row {i} of the data has {said}, the classifier has {classes} classes")


def _loss(logits: Tensor, batch: Batch, task: Task) -> Tensor:
    """Return the mean cross entropy of the next tokens, or of the rows' classes."""
    if task == "classify":
        return cross_entropy(logits, torch.tensor(batch.labels))
    target = batch.ids[:, 1:].masked_fill(~batch.mask[:, 1:], -100)
    return cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten())
