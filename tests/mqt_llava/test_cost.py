"""What an answer costs: estimates beside counted operations, budgets, schedules; and `mqt-llava cost`."""

import copy
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from benchmarks.measure import peak_memory
from mqt_llava import MQTLlavaConfig, MQTLlavaForConditionalGeneration, VisualTokenSchedule, cli
from mqt_llava.cli.cost import parse_amount
from mqt_llava.cost import CostModel, DeviceSpeed, measure_device, num_visual_tokens_for, schedule_within
from mqt_llava.modeling.budget_mqt_llava import CACHE_NAME
from tests.commands import assert_refused
from tests.small_model import NUM_QUERY_TOKENS, make_config, make_images, make_model, make_processor


pytestmark = pytest.mark.usefixtures("restore_global_settings")
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 264,
}
TEXTS = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gemma": {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gpt_neox": {},  # one fused projection, no gate
}


@pytest.fixture(scope="module")
def costs_7b():
    return CostModel(MQTLlavaConfig())


def layers_run(config) -> int:
    """How many layers the model asks of its vision tower."""
    with torch.device("meta"):
        model = MQTLlavaForConditionalGeneration(config)
    calls = []
    for module in model.model.vision_tower.modules():
        if type(module).__name__.endswith("EncoderLayer"):
            module.register_forward_hook(lambda *call: calls.append(call))
    with torch.no_grad():
        model.get_image_features(torch.empty(1, 3, 336, 336, device="meta"))
    return len(calls)


def test_flops_at_7b_sizes_agree_with_paper_and_pencil(costs_7b):
    tokens, width = 577, 1024
    layer = 2 * tokens * width * (4 * width + 2 * 4096) + 4 * tokens**2 * width
    vision = layers_run(costs_7b.config) * layer + 2 * 576 * width * 3 * 14 * 14
    for m in (256, 64, 16, 1):
        length, queried = 40 + m, 2 * m * width * (2 * width + 4096) + 2 * 2 * 576 * width**2 + 4 * m * 576 * width
        language = 32 * (2 * length * 4096 * (4 * 4096 + 3 * 11008) + 4 * length**2 * 4096)
        expected = {"vision_tower": vision, "query_transformer": queried, "language_model": language}
        expected["lm_head"] = 2 * 4096 * 32064
        assert costs_7b(m).prefill_flops == pytest.approx(expected, rel=0.01)


def test_flops_at_7b_sizes_agree_with_torch_at_full_length(costs_7b):
    with torch.device("meta"):
        model = MQTLlavaForConditionalGeneration(MQTLlavaConfig(attn_implementation="sdpa"))
        pixels, embeds = torch.empty(2, 3, 336, 336), torch.empty(2, 40 + 144, 4096)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.get_image_features(pixels, 144)
        model(inputs_embeds=embeds, logits_to_keep=1)
    assert costs_7b(144, batch_size=2).flops == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
@pytest.mark.parametrize("text", TEXTS)
def test_agrees_with_a_real_run(tower, text):
    vision_config = CONFIG_MAPPING[tower](
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=30, patch_size=5
    )
    config = make_config(
        vision_config=vision_config,
        text_config=CONFIG_MAPPING[text](**TEXT | TEXTS[text]),
        vision_feature_select_strategy="default" if tower.startswith("clip") else "full",
    )
    model = MQTLlavaForConditionalGeneration(config).eval()
    ids = torch.randint(5, 200, (3, 10 + 2 * 6))
    ids[:, 1:7] = ids[:, 8:14] = 3
    inputs = {"input_ids": ids, "pixel_values": torch.randn(6, 3, 30, 30), "logits_to_keep": 1}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as prefill:
            cache = model(**inputs, use_cache=True)[CACHE_NAME]
        with FlopCounterMode(display=False) as decode:
            model(input_ids=ids[:, -1:], **{CACHE_NAME: cache})
    cost = CostModel(config)(6, num_text_tokens=10, num_images=2, batch_size=3, num_new_tokens=2, dtype="float32")

    assert sum(cost.prefill_flops.values()) == prefill.get_total_flops()
    assert cost.decode_flops == decode.get_total_flops()
    assert cost.flops == prefill.get_total_flops() + decode.get_total_flops()
    assert sum(cost.weight_bytes.values()) == sum(p.nbytes for p in model.parameters())
    assert cost.kv_cache_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_activations_are_estimated_well():
    model = MQTLlavaForConditionalGeneration(make_config()).eval()
    ids = torch.randint(5, 200, (4, 400))
    with torch.no_grad():
        measured = peak_memory(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1), torch.device("cpu"))
    estimated = CostModel(model.config)(1, num_text_tokens=399, batch_size=4, dtype="float32").activation_bytes
    assert 0.5 < estimated / measured < 1.5


def test_leaves_the_config_as_it_was():
    config = make_config()
    before = copy.deepcopy(config)
    CostModel(config)
    assert config.to_dict() == before.to_dict()
    assert config._attn_implementation == before._attn_implementation


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"num_visual_tokens": 17}, "1 to 16"),
        ({"num_visual_tokens": True}, "True"),
        ({"batch_size": 0}, "batch_size.*at least 1; got 0"),
        ({"num_new_tokens": 1.5}, "num_new_tokens.*1.5"),
        ({"num_text_tokens": 0, "num_images": 0}, "empty"),
        ({"dtype": "int8"}, "bfloat16.*int8"),
    ],
)
def test_refuses_bad_requests(request_, message):
    with pytest.raises(ValueError, match=message):
        CostModel(make_config())(**request_)


def test_a_prompt_without_images_costs_no_vision():
    cost = CostModel(make_config())(num_images=0)
    assert cost.prefill_flops["vision_tower"] == cost.prefill_flops["query_transformer"] == 0
    assert cost.num_prompt_tokens == 40


def test_latency_is_the_slower_of_computing_and_reading():
    cost = CostModel(make_config())(4, num_new_tokens=11)
    computing, reading = DeviceSpeed(1.0, float("inf")), DeviceSpeed(float("inf"), 1.0)
    assert cost.latency(computing) == cost.flops
    assert cost.latency(reading) == sum(cost.prefill_read_bytes.values()) + 10 * cost.decode_read_bytes


@pytest.mark.parametrize("budget", ["flops", "memory_bytes", "latency_s"])
def test_finds_the_largest_m(budget):
    config, speed = make_config(), DeviceSpeed(1e9, 1e9)
    measure = {
        "flops": lambda c: c.flops,
        "memory_bytes": lambda c: c.memory_bytes,
        "latency_s": lambda c: c.latency(speed),
    }
    costs, request = CostModel(config), {"batch_size": 64, "num_text_tokens": 90, "num_new_tokens": 2}
    exact, least = (measure[budget](costs(m, **request)) for m in (7, 1))
    request["speed"] = speed
    assert num_visual_tokens_for(config, **{budget: exact}, **request) == 7
    assert costs.num_visual_tokens_for(**{budget: exact * 0.9999}, **request) == 6
    assert costs.num_visual_tokens_for(**{budget: exact * 1e3}, **request) == NUM_QUERY_TOKENS
    assert costs.num_visual_tokens_for(**{"flops": 1e15, budget: exact}, **request) == 7
    with pytest.raises(ValueError, match=rf"`{budget}`.*even m = 1 costs {least:.4g}".replace("+", r"\+")):
        costs.num_visual_tokens_for(**{budget: least * 0.99}, **request)


def test_needs_a_budget():
    with pytest.raises(ValueError, match="`flops`, `memory_bytes` or `latency_s`"):
        num_visual_tokens_for(make_config())


def test_measures_the_device():
    speed = measure_device("cpu", "float32")
    assert 1e8 < speed.flops_per_second < 1e16
    assert 1e7 < speed.bytes_per_second < 1e14
    assert all(0 < rate <= speed.flops_per_second for _, rate in speed.token_rates)


def test_few_tokens_take_longer_each():
    speed = DeviceSpeed(100.0, float("inf"), ((1, 10.0), (10, 50.0), (100, 100.0)))
    seconds = [speed.seconds(count, 0, count) for count in (1, 10, 55, 100, 1000)]
    assert seconds == pytest.approx([0.1, 0.2, 0.6, 1, 10])  # in between the mean of 0.2 and 1
    assert speed.seconds(55, 0) == 0.55 and speed.seconds(1, 0, 0) == 0.1
    assert DeviceSpeed(100.0, 1.0).seconds(1, 5, 1) == 5


class TestCommand:
    @pytest.fixture
    def cost(self, checkpoint, monkeypatch):
        monkeypatch.setattr("mqt_llava.cost.measure_device", lambda *args: DeviceSpeed(1e9, 1e9))
        monkeypatch.setenv("COLUMNS", "80")

        def invoke(*arguments, model=checkpoint):
            return CliRunner().invoke(cli.app, ["cost", "--model", str(model), *map(str, arguments)])

        return invoke

    @pytest.fixture
    def evaluated(self, tmp_path):
        """A folder with a config and an accuracy table, which is all that the command reads."""
        make_config().save_pretrained(tmp_path)
        table = {str(m): {"count": 50.0 + m, "all": 60.0 + m} for m in (1, 4, 16)} | {
            "16, blank picture": {"all": 9.0}
        }
        (tmp_path / "accuracy.json").write_text(json.dumps(table))
        return tmp_path

    def test_prints_a_table(self, cost):
        result = cost("--num-visual-tokens", "1,16", "--memory", "1GB")
        assert result.exit_code == 0, result.output
        assert [line.split()[0] for line in result.stdout.splitlines() if "FLOP " in line] == ["1", "16"]
        assert "budget: 16" in result.stdout

    def test_prints_json(self, cost):
        costs = CostModel(make_config())
        result = json.loads(cost("--json", "--flops", f"{costs(5).flops / 1e3}k", "--dtype", "bfloat16").stdout)
        assert result["largest_num_visual_tokens"] == 5
        assert [row["num_visual_tokens"] for row in result["costs"]] == [1, 2, 4, 5, 8, 16]
        assert result["costs"][3]["flops"] == costs(5).flops

    def test_shows_and_draws_accuracy(self, cost, evaluated, tmp_path):
        result = cost("--plot", tmp_path / "plot.png", model=evaluated)
        assert result.exit_code == 0, result.output
        assert [line.split()[-1] for line in result.stdout.splitlines() if "FLOP " in line] == ["61.0", "64.0", "76.0"]
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--flops", "many"], "number with or without k, M, G, T"),
            (["--flops", "1"], "m = 1 costs"),
            (["--num-visual-tokens", "17"], "from 1 to 16"),
            (["--num-visual-tokens", "x"], "is an integer"),
            (["--plot", "plot.png"], "carries no readable accuracy.json"),
        ],
    )
    def test_says_in_one_line_what_is_wrong(self, cost, arguments, message):
        result = cost(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("budget", [float("nan"), "2.5T", True], ids=repr)
def test_budgets_that_are_no_numbers_are_refused(budget):
    with pytest.raises(ValueError, match="`flops` must be a number"):
        num_visual_tokens_for(make_config(), flops=budget)


@pytest.mark.parametrize(
    ("texts", "num_new_tokens"),
    [
        (["<image> what?"], 6),
        (["<image><image> what?"], 6),
        (["<image> what?"], 100),
        (["a long text before the image, <image>", "<image> and a long text behind that image"], 6),
    ],
)
def test_a_schedule_costs_no_more_than_its_stages(texts, num_new_tokens):
    """Every answer is taken back: thresholds that nothing reaches."""
    config, model, processor = make_config(), make_model(), make_processor()
    model.set_attn_implementation("eager")  # whose products the counter knows
    schedule = VisualTokenSchedule([2, 5, NUM_QUERY_TOKENS], [1.0, 1.0])
    num_images = texts[0].count("<image>")
    inputs = processor(images=make_images(num_images * len(texts)), text=texts, padding=True, return_tensors="pt")
    with FlopCounterMode(display=False) as counter:
        model.generate(**inputs, num_visual_tokens=schedule, max_new_tokens=num_new_tokens, do_sample=False)
    request = {"num_text_tokens": inputs["input_ids"].shape[1] - num_images * NUM_QUERY_TOKENS}
    request |= {"num_images": num_images, "num_new_tokens": num_new_tokens, "batch_size": len(texts)}
    bound = sum(cost.flops for cost in CostModel(config).stages(schedule, **request))
    assert 0.2 * bound < counter.get_total_flops() <= bound


def test_a_schedule_within_a_budget_keeps_its_first_stages():
    schedule = VisualTokenSchedule([2, 5, NUM_QUERY_TOKENS], [0.9, 0.7], calibration={"tolerance": 0.01})
    costs = CostModel(make_config())
    spent = [cost.flops for cost in costs.stages(schedule, num_new_tokens=4)]
    within = schedule_within(make_config(), schedule, max_flops=sum(spent[:2]), num_new_tokens=4)
    assert within == VisualTokenSchedule([2, 5], [0.9])
    assert costs.schedule_within(schedule, max_flops=sum(spent), num_new_tokens=4) == schedule
    speed = DeviceSpeed(1e9, 1e9)
    slow = costs.schedule_within(schedule, max_seconds=costs.stages(schedule)[0].latency(speed) * 1.01, speed=speed)
    assert slow == VisualTokenSchedule([2], [])
    with pytest.raises(ValueError, match="The first stage, m = 2, may cost"):
        costs.schedule_within(schedule, max_flops=10)
    with pytest.raises(ValueError, match="`max_flops` or `max_seconds`"):
        costs.schedule_within(schedule)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("16GB", 16e9),
        ("16GiB", 16 * 2**30),
        ("16Gi", 16 * 2**30),
        ("1KiB", 1024),
        ("1kB", 1e3),
        ("1KB", 1e3),
        ("1.5MiB", 1.5 * 2**20),
        ("2.5T", 2.5e12),
        ("2e12", 2e12),
        ("800 GFLOP", 8e11),
        ("7", 7),
    ],
)
def test_amounts(text, amount):
    assert parse_amount(text) == amount


@pytest.mark.parametrize("text", ["", "GiB", "16 GBi", "16XiB", "-1GB"])
def test_wrong_amounts(text):
    assert_refused(CliRunner().invoke(cli.app, ["cost", f"--memory={text}"]), "16GB or 16GiB", f"got {text!r}")
