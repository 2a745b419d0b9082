"""GRU4Rec and Caser against the papers' formulas, written as loops over positions, filters and heights."""

import numpy as np
import torch

from rec_dist.methods.sequential.caser import Caser, CaserShape
from rec_dist.methods.sequential.gru4rec import GRU4Rec, GRU4RecShape
from rec_dist.methods.sequential.sequences import history_batch

HISTORY = np.asarray([3, 8, 1, 0, 4, 4, 7], dtype=np.int32)


def weights_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_gru4rec_is_its_recurrence():
    torch.manual_seed(1)
    model = GRU4Rec(GRU4RecShape(num_items=9, width=6, state_width=5, num_layers=2, dropout=0.4, max_length=20)).double().eval()
    w = weights_of(model)
    states = [np.zeros(5), np.zeros(5)]
    truth = []
    for item in HISTORY:
        x = w["item_embedding.weight"][item] * np.sqrt(6)
        for layer in range(2):
            h = states[layer]
            i_r, i_z, i_n = np.split(w[f"gru.weight_ih_l{layer}"] @ x + w[f"gru.bias_ih_l{layer}"], 3)
            h_r, h_z, h_n = np.split(w[f"gru.weight_hh_l{layer}"] @ h + w[f"gru.bias_hh_l{layer}"], 3)
            r, z = sigmoid(i_r + h_r), sigmoid(i_z + h_z)
            x = states[layer] = (1 - z) * np.tanh(i_n + r * h_n) + z * h
        truth.append(w["item_embedding.weight"] @ (w["project.weight"] @ x + w["project.bias"]))
    found = model.score(model.encode(history_batch([HISTORY[:3], HISTORY], 20)))[3:].detach().numpy()
    np.testing.assert_allclose(found, np.stack(truth), rtol=1e-12, atol=1e-12)


def test_caser_is_its_convolutions():
    torch.manual_seed(2)
    shape = CaserShape(num_items=9, width=6, window=4, num_horizontal=3, num_vertical=2, dropout=0.4, max_length=20)
    model = Caser(shape).double().eval()
    w = weights_of(model)
    truth = []
    for end in range(1, len(HISTORY) + 1):
        image = np.zeros((4, 6))
        for back, item in enumerate(HISTORY[:end][-4:][::-1]):
            image[3 - back] = w["item_embedding.weight"][item] * np.sqrt(6)
        parts = []
        for height in range(1, 5):
            filters, bias = w[f"horizontal.{height - 1}.weight"], w[f"horizontal.{height - 1}.bias"]  # (3, 6, height)
            for f in range(3):
                places = range(4 - height + 1)
                parts.append(max(max(0.0, (filters[f].T * image[i : i + height]).sum() + bias[f]) for i in places))
        for column in range(6):
            for v in range(2):
                parts.append(sum(w["vertical.weight"][v, k] * image[k, column] for k in range(4)) + w["vertical.bias"][v])
        hidden = np.maximum(w["join.weight"] @ np.asarray(parts) + w["join.bias"], 0)
        truth.append(w["item_embedding.weight"] @ hidden)
    found = model.score(model.encode(history_batch([HISTORY[:3], HISTORY], 20)))[3:].detach().numpy()
    np.testing.assert_allclose(found, np.stack(truth), rtol=1e-12, atol=1e-12)
