"""The tagger's network in plain PyTorch, with the weights of one of ours, and what it reads of the same batches."""

from typing import Any

import numpy as np
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

from benchmarks._timing import cores
from jaxmodels.cnn_cnn_lstm.config import CnnCnnLstmConfig
from jaxmodels.cnn_cnn_lstm.network import UNK, is_word
from train.settings import OptimizerConfig

Tensors = dict[str, torch.Tensor]


class Network(nn.Module):
    """One layer of characters, an embedded last tag. Its LSTM reads a batch of sentences, gathered from the rows."""

    def __init__(self, cfg: CnnCnnLstmConfig):
        super().__init__()
        self.cfg = cfg
        self.chars = nn.Embedding(cfg.chars, cfg.d_char, padding_idx=0)
        self.char_conv = nn.Conv1d(cfg.d_char, cfg.char_filters, cfg.char_width, padding="same")
        self.words = nn.Embedding(cfg.words, cfg.d_word, padding_idx=0)
        widths = [cfg.d_full, *[cfg.word_filters] * cfg.word_layers]
        self.word_convs = nn.ModuleList(nn.Conv1d(a, b, cfg.word_width, padding="same")
                                        for a, b in zip(widths, widths[1:], strict=False))
        self.tags = nn.Embedding(cfg.tags + 1, cfg.d_tag)
        self.lstm = nn.LSTM(cfg.d_enc + cfg.d_tag, cfg.d_hidden, batch_first=True)
        self.lstm.bias_hh_l0.requires_grad_(False)  # it would only double the steps of the other
        self.out = nn.Linear(cfg.d_hidden, cfg.tags)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, batch: Tensors) -> torch.Tensor:
        """Logits [S, L, V] of S sentences."""
        words, chars = batch["words"], batch["chars"]
        there, seen = (words > 0)[:, None], (chars > 0).flatten(0, 1)[:, None]
        if self.training:
            words = words.masked_fill((torch.rand(words.shape) < self.cfg.word_drop) & batch["real"], UNK)
        x = self.char_conv(self.chars(chars.flatten(0, 1)).transpose(1, 2)).relu() * seen
        x = x.max(-1).values.reshape(*words.shape, -1)  # nothing lies below the 0 of padding after a ReLU
        full = self.dropout(torch.cat([x, self.words(words)], -1)).transpose(1, 2) * there
        x = full
        for conv in self.word_convs:
            x = self.dropout(conv(x).relu() * there)
        encoded = torch.cat([x, full], 1).transpose(1, 2).flatten(0, 1)
        places = batch["places"]
        encoded = encoded.index_select(0, places.flatten()).reshape(*places.shape, -1)
        hidden, _ = self.lstm(torch.cat([encoded, self.tags(batch["before"])], -1))
        return self.out(self.dropout(hidden))

    def load(self, model: Any) -> "Network":
        """Takes the weights of a `CnnCnnLstm`."""
        ours = nnx.to_pure_dict(nnx.state(model))
        convs = [(self.char_conv, ours["chars"]["convs"][0])]
        convs += [(conv, ours["words"]["convs"][i]) for i, conv in enumerate(self.word_convs)]
        lstm, tags = ours["tags"]["lstm"], ours["tags"]
        values = [(self.chars.weight, ours["chars"]["embed"]), (self.words.weight, ours["words"]["embed"]),
                  (self.tags.weight, tags["embed"]), (self.out.weight, tags["out"].T),
                  (self.out.bias, tags["out_bias"]), (self.lstm.weight_ih_l0, lstm["input"].T),
                  (self.lstm.weight_hh_l0, lstm["hidden"].T), (self.lstm.bias_ih_l0, lstm["bias"]),
                  (self.lstm.bias_hh_l0, np.zeros_like(lstm["bias"]))]
        for conv, mine in convs:
            values += [(conv.weight, mine["kernel"].transpose(2, 1, 0)), (conv.bias, mine["bias"])]
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(torch.from_numpy(np.array(value)))
        return self


def tensors(batch: dict[str, np.ndarray], go: int) -> Tensors:
    """A batch of rows, and of the S sentences in them: places int[S, L] of their words in the flattened rows, before
    (the tags that are read), gold (-100 where no word is)."""
    real = is_word(batch["words"])
    flat, tags = np.pad(real.ravel(), 1), batch["tags"].ravel()  # START and END keep sentences apart
    starts, stops = (np.flatnonzero(change) for change in (flat[1:] & ~flat[:-1], flat[:-1] & ~flat[1:]))
    shape = len(starts), int((stops - starts).max())
    places, before, gold = np.zeros(shape, int), np.full(shape, go), np.full(shape, -100)
    for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        places[row, :stop - start] = np.arange(start, stop)
        before[row, 1:stop - start] = tags[start:stop - 1]
        gold[row, :stop - start] = tags[start:stop]
    found = {"words": batch["words"], "chars": batch["chars"], "real": real, "places": places, "before": before,
             "gold": gold}
    return {name: torch.from_numpy(np.asarray(array, bool if name == "real" else np.int64))
            for name, array in found.items()}


class Torch:
    """Training in PyTorch from the weights of `model`, on as many threads as there are cores."""

    def __init__(self, model: Any, batches: list[dict[str, np.ndarray]], options: OptimizerConfig, seed: int = 0):
        torch.set_num_threads(cores())
        torch.manual_seed(seed)
        self.network, self.clip = Network(model.cfg).load(model), options.clip
        self.batches = [tensors(batch, model.cfg.tags) for batch in batches]
        # Weight decay for matrices alone, as ours has it.
        decayed, others = ([p for p in self.network.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
            options.learning_rate, (options.beta1, options.beta2))

    def logits(self) -> np.ndarray:
        """Of the words of the first batch in their order, without dropout: float32[n, V]."""
        batch = self.batches[0]
        self.network.eval()
        with torch.inference_mode():
            return self.network(batch)[batch["gold"] >= 0].numpy()

    def __call__(self) -> float:
        """One step on every batch; the last loss, nats a word."""
        self.network.train()
        for batch in self.batches:
            self.optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(self.network(batch).flatten(0, 1), batch["gold"].flatten())
            loss.backward()
            if self.clip:
                nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
            self.optimizer.step()
        return loss.item()
