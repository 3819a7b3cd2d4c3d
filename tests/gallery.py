"""A gallery of random visual inputs and texts, in memory."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset


class Gallery(Dataset):
    """Evaluation data in memory, with the attributes of LAVIS's RetrievalEvalDataset."""

    def __init__(self, number: int, texts_each: int = 1, frames: int | None = None, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        shape = (number, 3, 32, 32) if frames is None else (number, 3, frames, 32, 32)
        self.visuals = torch.randn(shape, generator=generator)
        words = "red green blue circle square star on the left right top small large".split()
        picks = torch.randint(len(words), (number * texts_each, 12), generator=generator)
        lengths = torch.randint(1, 13, (number * texts_each,), generator=generator)
        self.text = [
            " ".join(words[w] for w in row[:n])
            for row, n in zip(picks.tolist(), lengths.tolist(), strict=True)
        ]
        self.image = [str(i) for i in range(number)]
        self.img2txt = {i: list(range(i * texts_each, (i + 1) * texts_each)) for i in range(number)}
        self.txt2img = {t: i for i, texts in self.img2txt.items() for t in texts}
        self.key = "image" if frames is None else "video"
        self.annotation = [{self.key: name} for name in self.image]

    def __len__(self):
        return len(self.visuals)

    def __getitem__(self, index):
        return {self.key: self.visuals[index], "index": index}
