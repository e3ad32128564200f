"""Similarity of the hidden states of a sequence, from those of its tokens."""

from torch import Tensor
from torch.nn.functional import cosine_similarity


def flatten_cosine(a_TD: Tensor, b_NTD: Tensor) -> Tensor:
    """Return the cosine of the whole states as one vector each, as LaCo's code does. [N]"""
    return cosine_similarity(a_TD.flatten()[None], b_NTD.flatten(1), dim=-1)


def token_mean_cosine(a_TD: Tensor, b_NTD: Tensor) -> Tensor:
    """Return the mean over tokens of the cosine at each token. [N]"""
    return cosine_similarity(a_TD[None], b_NTD, dim=-1).mean(-1)


def last_token_cosine(a_TD: Tensor, b_NTD: Tensor) -> Tensor:
    """Return the cosine at the last token. [N]"""
    return cosine_similarity(a_TD[None, -1], b_NTD[:, -1], dim=-1)


POOLING = {"flatten": flatten_cosine, "token_mean": token_mean_cosine, "last_token": last_token_cosine}
