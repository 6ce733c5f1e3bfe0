"""Gradients that tests of methods know beforehand, and a layer of nine weights."""

import torch


class Given:
    """Gradients that are known; notes what was asked for."""

    def __init__(self, scores):
        self.scores, self.asked = scores, []

    def largest(self, count, among):
        self.asked.append((count, among.clone()))
        order = torch.where(among, self.scores, -1.0).flatten().argsort(descending=True, stable=True)
        mask = torch.zeros(among.numel(), dtype=torch.bool)
        mask[order[:count]] = True
        return mask.view(among.shape)


THETA = torch.tensor([[0.0, 3.0, -0.1], [2.0, 0.0, 0.2], [0.0, -4.0, 0.0]])
ACTIVE = THETA != 0
