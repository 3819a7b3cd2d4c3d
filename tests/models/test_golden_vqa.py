"""Parity of question answering with the implementation that the paper's authors released."""

from __future__ import annotations

import pytest
import torch
from golden_cases import Case, assert_close
from transformers import BatchEncoding

from lavis_uniadapter.backbone.build import build_text_decoder
from lavis_uniadapter.checkpoints.released import load_released_checkpoint, released_to_ours
from lavis_uniadapter.common.schema.methods import AdapterConfig
from lavis_uniadapter.models.vqa import BlipUniAdapterVQA


class GivenTokens:
    """Stands for a tokenizer: knows the golden questions, answers and candidates by name."""

    pad_token_id = 0

    def __init__(self, case: Case):
        dims = case.about["dims"]
        self.enc_token_id, self.bos_token_id = dims["enc"], dims["bos"]
        self._tokens = {
            "question": (case["in.question_ids"], case["in.question_mask"]),
            "answer": (case["in.answer_ids"], case["in.answer_mask"]),
            "candidate": (case["in.candidate_ids"], case["in.candidate_mask"]),
        }

    def __call__(self, texts, **kwargs):
        ids, mask = self._tokens[texts[0].split()[0]]
        assert len(texts) == len(ids)
        return BatchEncoding({"input_ids": ids.clone(), "attention_mask": mask})


@pytest.fixture(params=["vqa_image", "vqa_video"])
def case(request):
    return Case(request.param)


@pytest.fixture
def model(case):
    config = case.about["config"]
    model = BlipUniAdapterVQA(
        *case.encoders(), build_text_decoder(case.about["med_config"]), GivenTokens(case)
    )
    model.attach_tuning(
        "uniadapter",
        AdapterConfig(
            bottleneck=config["adapter_dim"], kv_bottleneck=config["video_key_adapter_dim"]
        ),
    )
    load_released_checkpoint(model, case.under("state."))
    return model


def samples(case):
    visual = case["in.visual"]
    video = case.about["frames"] is not None
    return {
        "video" if video else "image": visual.transpose(1, 2) if video else visual,
        "text_input": [f"question {i}" for i in range(len(case["in.question_ids"]))],
        "answer": [f"answer {i}" for i in range(len(case["in.answer_ids"]))],
        "n_answers": case["in.n_answers"],
        "weight": case["in.weights"],
    }


def test_loss_and_gradients(case, model):
    loss = model.train()(samples(case)).loss
    assert_close(loss, case["out.loss"], 1e-5)
    loss.backward()
    gradients = {name: p.grad for name, p in model.trainable_parameters().items()}
    expected = released_to_ours(case.under("grad."), "default")
    assert set(gradients) == set(expected)
    assert any("key_value.text_decoder" in name for name in expected)
    # The key adapters' last bias has gradient zero but for rounding; see test_golden.
    floor = 1e-4 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, value in expected.items():
        assert_close(gradients[name], value, 1e-4, floor)


@pytest.mark.parametrize("k", [4, 7])
def test_ranked_answers(case, model, k):
    candidates = [f"candidate {i}" for i in range(7)]
    model.eval()
    with torch.no_grad():
        answers = model.predict_answers(
            samples(case), answer_list=candidates, inference_method="rank", num_ans_candidates=k
        )
    assert answers == [candidates[i] for i in case[f"out.rank_k{k}"].tolist()]
