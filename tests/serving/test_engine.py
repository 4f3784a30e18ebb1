"""vLLM's greedy tokens are those of `generate`, for every m and in every way that vLLM runs a model."""

import pytest

from tests.serving.common import answer_with_transformers, answer_with_vllm, make_requests


pytestmark = pytest.mark.vllm
NUM_VISUAL_TOKENS = (1, 2, 4, 16, 64, None)
ONE_BY_ONE, TOGETHER, CHAT = "one by one", "together", "chat"
COLD = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}


def rows_of(requests):
    """The visual tokens that the encoder has to make for each image, M where none are said."""
    return [request["num_visual_tokens"] or 64 for request in requests for _ in request["images"]]


@pytest.fixture(scope="module")
def requests(pictures):
    return make_requests(pictures, NUM_VISUAL_TOKENS)


@pytest.fixture(scope="module")
def expected(tiny, requests):
    answers = answer_with_transformers(tiny, requests)
    assert len({tuple(answer) for answer in answers[: len(NUM_VISUAL_TOKENS)]}) > 2  # m makes a difference
    return answers


def test_one_by_one_and_in_a_batch_with_warm_caches(tiny, requests, expected):
    found = answer_with_vllm(tiny, requests, passes=(ONE_BY_ONE, ONE_BY_ONE, TOGETHER))
    assert found["passes"] == [expected] * 3
    # Each picture once for each m it was asked at: nothing is shared between them, nothing is made twice
    once = {(image, r["num_visual_tokens"]): r["num_visual_tokens"] or 64 for r in requests for image in r["images"]}
    assert sorted(found["rows"]) == sorted(once.values())


def test_chat(tiny, pictures):
    """Images stand on lines of their own there."""
    requests = make_requests(pictures, NUM_VISUAL_TOKENS)[:-1]
    found = answer_with_vllm(tiny, requests, passes=(CHAT,))
    assert found["passes"] == [answer_with_transformers(tiny, requests)]


def test_in_one_mixed_batch_with_cold_caches(tiny, requests, expected):
    found = answer_with_vllm(tiny, requests, passes=(TOGETHER,))
    assert found["passes"] == [expected]


def test_without_caches_and_with_chunked_prefill(tiny, requests, expected):
    """Prompts are cut at 72 tokens, within images too."""
    found = answer_with_vllm(
        tiny, requests, passes=(TOGETHER, ONE_BY_ONE), max_num_batched_tokens=72, max_num_seqs=4, **COLD
    )
    assert found["passes"] == [expected] * 2
    assert set(found["rows"]) == set(
        rows_of(requests)
    )  # no image is encoded with another number of tokens than was asked


def test_server_wide_default(tiny, requests, expected):
    """A request's own m goes before it."""
    found = answer_with_vllm(tiny, requests, mm_processor_kwargs={"num_visual_tokens": 4})
    assert found["passes"][0][NUM_VISUAL_TOKENS.index(None)] == expected[NUM_VISUAL_TOKENS.index(4)]
    said = [i for i, request in enumerate(requests) if request["num_visual_tokens"] or not request["images"]]
    assert [found["passes"][0][i] for i in said] == [expected[i] for i in said]


def test_compiled(tiny, requests, expected):
    found = answer_with_vllm(tiny, requests, passes=(ONE_BY_ONE, TOGETHER), enforce_eager=False)
    assert found["passes"] == [expected] * 2


def test_tensor_parallel(tiny, requests, expected):
    found = answer_with_vllm(tiny, requests, passes=(ONE_BY_ONE, TOGETHER), tensor_parallel_size=2)
    assert found["passes"] == [expected] * 2
