"""The mathematics of ddpm.py, from directions other than its formulas, and the numbers of the official implementations.

Two tools recur. Everything runs in float64 where the claim is an identity, so that tolerances are rounding only. And where a
network is needed it is the exact one: for pixels drawn from N(m, s^2), or from an even mixture of that and N(-m, s^2), the
best prediction is known in closed form, and so is what every sampler should return.

golden/diffusion_*.npz hold what OpenAI's guided-diffusion, DiT, U-ViT and diffusers computed. `meta` in each says how, and to
which tolerance; the tests use that tolerance.
"""
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch.testing import assert_close

from ddpm import (Diffusion, SAMPLERS, SCHEDULES, begin, cosine_betas, ddim_invert, ddim_steps, ddpm_steps,
                  discretized_log_likelihood, dpm_nodes, dpm_steps, dpm_update, guided, keyed_generator, linear_betas, normal_kl,
                  reverse_process, sample, scaled_linear_betas)

GAUSS = {"kind": "gauss", "m": 0.3, "s": 0.5}
MIXTURE = {"kind": "mixture", "m": 0.6, "s": 0.2}
LAWS = {"gauss": GAUSS, "mixture": MIXTURE}
EXACT = {"rtol": 1e-9, "atol": 1e-9}         # float64 identities: 1e-16 times hundreds of terms, over signals as faint as 1e-5

schedules = st.one_of(                       # of at most 40 steps, so that a test can treat every t as one batch
    st.builds(linear_betas, st.integers(2, 40), end=st.floats(0.001, 0.3)),
    st.builds(cosine_betas, st.integers(2, 40)),
    st.builds(scaled_linear_betas, st.integers(2, 40), end=st.floats(0.001, 0.3)),
    st.lists(st.floats(1e-4, 0.5), min_size=2, max_size=20).map(np.array))
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
predictions = st.sampled_from(["eps", "x0", "v"])
seeds = st.integers(0, 2 ** 32)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def column(values):
    """One number for each image, to broadcast over its pixels."""
    return torch.as_tensor(values).reshape(-1, 1, 1, 1)


def every_step(diffusion):
    return torch.arange(diffusion.T)


def denoiser(betas, law, prediction="eps"):
    """The best possible model(x, t, y) of pixels that follow the law: E[eps | x_t], or that of x0, or of v."""
    alpha_bars = torch.from_numpy(np.cumprod(1 - betas))

    def model(x, t, y=None):
        a, sigma = column(alpha_bars[t]) ** 0.5, (1 - column(alpha_bars[t])) ** 0.5
        m, spread = law["m"], a ** 2 * law["s"] ** 2 + sigma ** 2
        centre = m * torch.tanh(a * m * x / spread) if law["kind"] == "mixture" else m
        eps = sigma * (x - a * centre) / spread
        x0 = (x - sigma * eps) / a
        return {"eps": eps, "x0": x0, "v": a * eps - sigma * x0}[prediction].to(x.dtype)
    return model


def mixture_quantiles(p, m, variance):
    """Where an even mixture of N(m, variance) and N(-m, variance) has the share p below it, by bisection."""
    low, high = torch.full_like(p, -20), torch.full_like(p, 20)
    for _ in range(60):
        middle = (low + high) / 2
        share = sum(torch.special.ndtr((middle - centre) / variance ** 0.5) / 2 for centre in (m, -m))
        low, high = torch.where(share < p, middle, low), torch.where(share < p, high, middle)
    return middle


def noise_and_image(diffusion, law, n=400):
    """Noise x_T on n equal quantiles, and the image that the exact probability flow makes of it: the flow keeps quantiles."""
    alpha_bar, m, s = diffusion.alpha_bars[-1], law["m"], law["s"]
    spread = alpha_bar * s ** 2 + 1 - alpha_bar
    p = (torch.arange(n, dtype=torch.float64).reshape(1, 1, -1, 20) + 0.5) / n
    if law["kind"] == "gauss":
        z = math.sqrt(2) * torch.erfinv(2 * p - 1)
        return alpha_bar ** 0.5 * m + spread ** 0.5 * z, m + s * z
    return mixture_quantiles(p, alpha_bar ** 0.5 * m, spread), mixture_quantiles(p, m, s ** 2)


class Recorder:
    """A model that remembers which step and how many rows each call had."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, x, t, y=None):
        assert (t == t[0]).all() and t.dtype == torch.int64
        self.calls.append((int(t[0]), len(x)))
        return self.model(x, t, y)

    @property
    def steps(self):
        return [step for step, _ in self.calls]


# The official implementations' numbers

@functools.cache
def golden(name):
    with np.load(Path(__file__).parent / "golden" / f"diffusion_{name}.npz") as file:
        arrays = {key: file[key] for key in file.files if key != "meta"}
        return SimpleNamespace(meta=json.loads(str(file["meta"])), numpy=arrays,
                               torch={key: torch.from_numpy(array) for key, array in arrays.items()})


def official_betas(schedule, T):
    """guided-diffusion keeps T times beta constant in its linear schedule; we leave T to the caller."""
    if schedule == "linear":
        return linear_betas(T, start=1e-4 * 1000 / T, end=0.02 * 1000 / T)
    return {"cosine": cosine_betas, "scaled_linear": scaled_linear_betas}[schedule](T)


def official_steps(sections):
    if isinstance(sections, list) or sections.startswith("ddim"):
        return sections
    counts = [int(count) for count in sections.split(",")]
    return counts if len(counts) > 1 else counts[0]


VARIANCES = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned"}


@pytest.mark.parametrize("case", golden("schedules").meta["cases"])
def test_schedules_and_their_tables_equal_openais(case):
    data, config = golden("schedules").numpy, golden("schedules").meta["cases"][case]
    betas = official_betas(config["kind"], config["T"])
    small, large, learned = (Diffusion(betas, variance=variance) for variance in ("small", "large", "learned"))
    t, one, zero = every_step(small), *(torch.full((small.T, 1, 1, 1), x, dtype=torch.float64) for x in (1, 0))
    tables = {
        "betas": small.betas, "alphas_cumprod": small.alpha_bars, "posterior_variance": small.beta_tildes,
        "posterior_log_variance_clipped": small.q_posterior(one, one, t)[2],
        "posterior_mean_coef1": small.q_posterior(one, zero, t)[0], "posterior_mean_coef2": small.q_posterior(zero, one, t)[0],
        "fixed_large_variance": large.p_mean_variance(one, one, t)[1],
        "fixed_large_log_variance": large.p_mean_variance(one, one, t)[2],
        "log_betas": learned.p_mean_variance(torch.ones(small.T, 2, 1, 1), one, t)[2]}
    tables = {name: np.asarray(table).ravel() for name, table in tables.items()}
    for name, table in tables.items():
        np.testing.assert_allclose(table[data[f"in_{case}_idx"]], data[f"out_{case}_{name}"], rtol=1e-9, err_msg=name)
    tables["log_alphas_cumprod"] = np.log(small.alpha_bars)
    sums = [tables[name].sum() for name in ("betas", "log_alphas_cumprod", "posterior_log_variance_clipped",
                                            "posterior_mean_coef1", "posterior_mean_coef2")]
    np.testing.assert_allclose(sums, data[f"out_{case}_sums"], rtol=1e-9)


@pytest.mark.parametrize("case", golden("respacing").meta["cases"])
def test_respacing_equals_openais(case):
    data, config = golden("respacing").numpy, golden("respacing").meta["cases"][case]
    diffusion = Diffusion(official_betas(config["schedule"], config["T"])).respaced(official_steps(config["sections"]))
    t, one, zero = every_step(diffusion), *(torch.full((diffusion.T, 1, 1, 1), x, dtype=torch.float64) for x in (1, 0))
    mean, _, log_variance = diffusion.q_posterior(one, zero, t)
    np.testing.assert_array_equal(diffusion.timesteps, data[f"out_{case}_steps"])
    for name, table in {"betas": diffusion.betas, "alphas_cumprod": diffusion.alpha_bars, "posterior_mean_coef1": mean,
                        "posterior_log_variance_clipped": log_variance}.items():
        table = np.asarray(table).ravel()[data[f"in_{case}_idx"]]
        np.testing.assert_allclose(table, data[f"out_{case}_{name}"], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("case", golden("respacing").meta["errors"], ids=lambda case: case["sections"])
def test_respacing_refuses_what_openai_refuses(case):
    with pytest.raises(ValueError):
        Diffusion(linear_betas(case["T"])).respaced(official_steps(case["sections"]))


def toy_network(prediction, learned, c=0.7, b=0.2):
    """The toy of diffusion_gaussian.npz, and its three parameters."""
    a, b, c = (torch.tensor(value, requires_grad=True) for value in ({"eps": 0.9, "x0": 0.99}[prediction], b, c))

    def model(x, t, y=None):
        output = a * x + b * column(torch.sin(t / 100))
        return torch.cat([output, c * torch.tanh(x + 0.3)], dim=1) if learned else output
    return model, (a, b, c)


FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}                       # of diffusion_gaussian.npz
BITS = {"rtol": 2e-3, "atol": 2e-4}                          # of its losses: the bound cancels digits


def test_forward_process_equals_openais():
    data, diffusion = golden("gaussian").torch, Diffusion(linear_betas())
    x0, t = data["in_x0"], data["in_t"]
    xt = diffusion.q_sample(x0, t, data["in_noise"])
    mean, variance, log_variance = diffusion.q_posterior(x0, xt, t)
    assert_close(xt, data["out_q_sample"], **FLOAT32)
    assert_close(mean, data["out_posterior_mean"], **FLOAT32)
    assert_close(variance.flatten(), data["out_posterior_variance"], **FLOAT32)
    assert_close(log_variance.flatten(), data["out_posterior_log_variance"], **FLOAT32)


@pytest.mark.parametrize("clip", ["clip", "noclip"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_reverse_step_equals_openais(prediction, variance, clip):
    data, diffusion = golden("gaussian").torch, Diffusion(linear_betas(), prediction, VARIANCES[variance])
    x, t, case = data["in_x"], data["in_t"], f"out_p_{prediction}_{variance}"
    output = toy_network(prediction, variance == "learned_range")[0](x, t)
    mean, _, log_variance, x0 = diffusion.p_mean_variance(output, x, t, clip == "clip")
    assert_close(mean, data[f"{case}_{clip}_mean"], **FLOAT32)
    expected = data[f"{case}_noclip_log_variance"]           # one number for each image if it is fixed
    assert_close(log_variance.reshape(expected.shape), expected, **FLOAT32)
    assert_close(x0, data.get(f"{case}_{clip}_pred_xstart", output[:, :2]), **FLOAT32)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_losses_and_their_gradients_equal_openais(prediction, variance):
    data, diffusion = golden("gaussian").torch, Diffusion(linear_betas(), prediction, VARIANCES[variance])
    case = f"{prediction}_{variance}_mse"
    model, parameters = toy_network(prediction, variance == "learned_range")
    losses = diffusion.losses(model, data["in_x0"], data["in_t"], None, data["in_noise"])
    assert list(losses) == golden("gaussian").meta["loss_rows"][case]
    assert_close(torch.stack(list(losses.values())), data[f"out_loss_{case}"], **BITS)
    losses["loss"].sum().backward()
    gradient = torch.stack([torch.zeros(()) if p.grad is None else p.grad for p in parameters])
    assert_close(gradient, data[f"out_grad_{case}"], **BITS)


def test_likelihood_of_a_pixel_equals_openais():
    data = golden("gaussian").torch
    x, mean, log_scale = (data[f"in_nll_{name}"] for name in ("x", "mean", "log_scale"))
    assert_close(discretized_log_likelihood(x, mean, log_scale), data["out_nll_log_prob"], **FLOAT32)


def test_divergence_of_gaussians_equals_openais():
    assert_close(normal_kl(*golden("gaussian").torch["in_kl_args"]), golden("gaussian").torch["out_kl"], **FLOAT32)


@pytest.mark.parametrize("prediction, variance, clip", [
    ("eps", "learned_range", "clip"), ("eps", "learned_range", "noclip"), ("eps", "fixed_large", "clip"),
    ("x0", "fixed_small", "clip")])
def test_bits_per_dimension_equal_openais(prediction, variance, clip):
    case = f"{prediction}_{variance}_{clip}"
    data, diffusion = golden("gaussian").torch, Diffusion(official_betas("linear", 50), prediction, VARIANCES[variance])
    bits = diffusion.bits_per_dim(toy_network(prediction, variance == "learned_range")[0], data["in_bpd_x0"],
                                  noise=data["in_bpd_noises"].flip(0), clip=clip == "clip")      # their loop starts at t = T-1
    assert_close(bits["total"], data[f"out_bpd_{case}_total_bpd"], **BITS)
    assert_close(bits["prior"], data[f"out_bpd_{case}_prior_bpd"], **BITS)
    assert_close(bits["vb"].flip(1), data[f"out_bpd_{case}_vb"], **BITS)
    assert_close(bits["mse"].flip(1), data[f"out_bpd_{case}_mse"], **BITS)


def official_sampling(case):
    """A case of diffusion_samplers.npz -> its configuration, process and exact network."""
    config, laws = (golden("samplers").meta[key] for key in ("cases", "laws"))
    config = {"mean": "eps", "var": "fixed_small", "eta": 0.0, **config[case]}
    betas = official_betas(config["schedule"], config["T"])
    exact = denoiser(betas, laws[config["law"]], config["mean"])
    learned = config["var"] == "learned_range"
    model = Recorder(lambda x, t, y: torch.cat([exact(x, t), 0.6 * torch.tanh(x)], dim=1) if learned else exact(x, t))
    return config, Diffusion(betas, config["mean"], VARIANCES[config["var"]]), model


SAMPLING = {"rtol": 1e-3, "atol": 2e-4}                      # of diffusion_samplers.npz: float32 trajectories


@pytest.mark.parametrize("case", [case for case in golden("samplers").meta["cases"] if not case.startswith("inv")])
def test_samplers_draw_openais_trajectories(case):
    data, (config, diffusion, model), states = golden("samplers").torch, official_sampling(case), []
    sample(diffusion, model, data["in_xT"].shape, sampler={"ancestral": "ddpm"}.get(config["sampler"], config["sampler"]),
           steps=official_steps(config["sections"]), eta=config["eta"], clip=config["clip"],
           noise=torch.cat([data["in_xT"][None], data["in_noises"]]), callback=lambda step, x, x0: states.append((x, x0)))
    kept = data[f"in_{case}_keep"]
    assert model.steps == data[f"out_{case}_model_t"].tolist()
    assert_close(torch.stack([x for x, _ in states])[kept], data[f"out_{case}_x"], **SAMPLING)
    assert_close(torch.stack([x0 for _, x0 in states])[kept], data[f"out_{case}_pred_x0"], **SAMPLING)


@pytest.mark.parametrize("case", ["inv10", "inv20_mixture"])
def test_inversion_and_its_decoding_equal_openais(case):
    data, (config, diffusion, model) = golden("samplers").torch, official_sampling(case)
    xT = ddim_invert(diffusion, model, data[f"in_{case}_x0"], steps=config["sections"])
    decoded = sample(diffusion, model, xT.shape, sampler="ddim", steps=config["sections"], noise=xT)
    assert_close(xT, data[f"out_{case}_x"][-1], **SAMPLING)
    assert_close(decoded, data[f"out_{case}_decoded"], **SAMPLING)


def toy_conditional_network(x, t, y):
    """The toy of diffusion_guidance.npz."""
    y = column(y)
    prediction = 0.8 * x + 0.2 * column(torch.sin(t / 100)) + 0.3 * (y + 1) / 10 * torch.cos(2 * x)
    return torch.cat([prediction, 0.5 * torch.tanh(x + 0.1 * y)], dim=1)


@pytest.mark.parametrize("name, scale, channels", [
    ("allchannels_scale1.5", 1.5, None), ("allchannels_scale4.0", 4.0, None),
    ("dit_scale1.5", 1.5, 3), ("dit_scale4.0", 4.0, 3), ("uvit_scale0.4", 1 + 0.4, None), ("uvit_scale1.0", 1 + 1.0, None)])
def test_guidance_equals_dits_and_uvits(name, scale, channels):
    data = golden("guidance").torch
    x, y, t = (data[f"in_{name}"] for name in "xyt")
    output = guided(toy_conditional_network, y, torch.full_like(y, 10), scale, channels)(x, t)
    expected = data[f"out_{name}"]                           # U-ViT has no variance half
    assert_close(output[:, :expected.shape[1]], expected, **FLOAT32)


@pytest.mark.parametrize("name, channels", [("loop", 3), ("loop_allchannels", None)])
def test_guided_sampling_equals_dits(name, channels):
    data, states = golden("guidance").torch, []
    x, y = data["in_x"], data["in_y"]
    sample(Diffusion(linear_betas(), variance="learned"), toy_conditional_network, x.shape, y, steps=10, cfg_scale=1.5,
           cfg_channels=channels, y_null=10, noise=torch.cat([x[None], data["in_loop_noises"][:, :3]]),
           callback=lambda step, x, x0: states.append(x))
    assert_close(torch.stack(states), data[f"out_{name}_x"], rtol=1e-3, atol=1e-4)


DPM_CASES = [case for case, config in golden("dpm_solver").meta["cases"].items() if "int" in case and case.startswith("uvit")
             or case.startswith(("hf_1", "hf_2m")) and config["solver_type"] == "midpoint"]


@pytest.mark.parametrize("case", DPM_CASES)
def test_dpm_solver_updates_equal_uvits_and_diffusers(case):
    data, config = golden("dpm_solver").torch, golden("dpm_solver").meta["cases"][case]
    betas = official_betas(config["schedule"], 1000)
    diffusion, model = Diffusion(betas), denoiser(betas, golden("dpm_solver").meta["laws"][config["law"]])
    nodes = config["timesteps"] if case.startswith("uvit") else data[f"out_{case}_timesteps"].tolist()
    nodes = nodes + [0] if config.get("final") == "sigma_min" else nodes
    if config["order"] == 2:
        states = [x for _, x, _ in dpm_steps(diffusion, reverse_process(diffusion, model), data["in_xT"], nodes)]
    else:
        states = first_order_states(diffusion, model, data["in_xT"], nodes, to_zero=config.get("final") == "zero")
    states = torch.stack(states)[:len(data[f"out_{case}_x"])]            # some references stop before the step to no noise
    assert_close(states, data[f"out_{case}_x"], rtol=1e-3, atol=3e-4)


def first_order_states(diffusion, model, x, nodes, to_zero):
    """x after each first-order step along the nodes, and after a last one to no noise."""
    states, levels = [], [*diffusion.alpha_bars[nodes]] + [1 - 1e-12] * to_zero
    for step, here, after in zip(nodes, levels, levels[1:]):
        t = torch.full((len(x),), step)
        x0, _ = diffusion.predict(model(x, t), x, t)
        log_snrs = [0.5 * math.log(level / (1 - level)) for level in (here, here, after)]
        x = dpm_update(x, x0, None, log_snrs, here, after)
        states.append(x)
    return states


# Schedules

@pytest.mark.parametrize("T", [1, 2, 100, 1000, 4000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_have_T_variances_between_zero_and_one(schedule, T):
    betas = SCHEDULES[schedule](T)
    assert betas.shape == (T,) and betas.dtype == np.float64
    assert (0 < betas).all() and (betas < 1).all()


@given(st.integers(2, 2000), st.floats(1e-5, 1e-3), st.floats(0.01, 0.5))
def test_linear_betas_rise_in_equal_steps_from_start_to_end(T, start, end):
    betas = linear_betas(T, start, end)
    np.testing.assert_allclose([betas[0], betas[-1]], [start, end])
    np.testing.assert_allclose(np.diff(betas), (end - start) / (T - 1))


@given(st.integers(2, 2000), st.floats(1e-5, 1e-3), st.floats(0.01, 0.5))
def test_scaled_linear_deviations_rise_in_equal_steps_from_start_to_end(T, start, end):
    betas = scaled_linear_betas(T, start, end)
    np.testing.assert_allclose([betas[0], betas[-1]], [start, end])
    np.testing.assert_allclose(np.diff(np.sqrt(betas)), (math.sqrt(end) - math.sqrt(start)) / (T - 1))


@given(st.integers(2, 2000))
def test_cosine_schedule_turns_signal_into_noise_at_constant_speed(T):
    begin, end = np.array([0.008, 1.008]) / 1.008 * np.pi / 2                # as an angle whose cosine is the signal
    signal = np.cumprod(1 - cosine_betas(T)[:-1]) * np.cos(begin) ** 2       # the last beta is capped
    np.testing.assert_allclose(np.arccos(np.sqrt(signal)), np.linspace(begin, end, T + 1)[1:-1], rtol=1e-9)
    assert cosine_betas(T)[-1] <= 0.999


@given(schedules)
def test_alpha_bar_falls_strictly_from_one_to_zero(betas):
    assert (np.diff([1.0, *Diffusion(betas).alpha_bars, 0.0]) < 0).all()


# The forward process

@given(schedules)
def test_folding_all_forward_steps_gives_the_moments_of_one_jump(betas):
    diffusion, one, zero = Diffusion(betas), torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
    mean, variance = one, zero
    for t in every_step(diffusion)[:, None]:                 # a step is affine: x_prev passes by `keep`, fresh noise by `add`
        keep, add = diffusion.q_step(one, t, zero), diffusion.q_step(zero, t, one)
        mean, variance = keep * mean, keep ** 2 * variance + add ** 2
        assert_close(diffusion.q_sample(one, t, zero), mean, **EXACT)
        assert_close(diffusion.q_sample(zero, t, one) ** 2, variance, **EXACT)


def test_two_forward_steps_equal_one_jump():
    n, diffusion, x0 = 200_000, Diffusion(np.array([0.3, 0.6])), torch.full((1, 1, 1, 200_000), 0.8).double()
    first, second = torch.tensor([0]), torch.tensor([1])
    x1 = diffusion.q_step(x0, first, normal(1, 1, 1, n, seed=1))
    steps = diffusion.q_step(x1, second, normal(1, 1, 1, n, seed=2))
    jump = diffusion.q_sample(x0, second, normal(1, 1, 1, n, seed=3))
    # the variance of x_2 is below 1: 5 standard errors of a difference of means 5 sqrt(2 / n), of variances 5 sqrt(4 / n)
    assert abs(steps.mean() - jump.mean()) < 5 * math.sqrt(2 / n)
    assert abs(steps.var() - jump.var()) < 5 * math.sqrt(4 / n)


@given(schedules, shapes, seeds)
def test_each_image_is_noised_by_its_own_step(betas, shape, seed):
    diffusion, x0, eps = Diffusion(betas), normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
    t = torch.linspace(0, diffusion.T - 1, shape[0]).round().long()
    alone = [diffusion.q_sample(x0[i:i + 1], t[i:i + 1], eps[i:i + 1]) for i in range(shape[0])]
    assert torch.equal(diffusion.q_sample(x0, t, eps), torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arithmetic_keeps_the_dtype_of_the_image(dtype):
    diffusion, x, t = Diffusion(linear_betas()), normal(2, 1, 2, 3, dtype=dtype), torch.tensor([0, 999])
    tensors = [diffusion.q_sample(x, t, x), *diffusion.q_posterior(x, x, t), *diffusion.p_mean_variance(x, x, t)]
    assert {tensor.dtype for tensor in tensors} == {dtype}


# Bayes' rule

@given(schedules, st.floats(0, 1), st.floats(-1, 1), st.floats(-3, 3))
def test_bayes_rule_by_quadrature_gives_the_posterior(betas, place, x0, eps):
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): Eq. 2-8, from Eq. 2-1 and 2-3 alone."""
    diffusion, i = Diffusion(betas), 1 + round(place * (len(betas) - 2))
    signal, spread, beta = np.prod(1 - betas[:i]) ** 0.5, 1 - np.prod(1 - betas[:i]), betas[i]
    xt = (1 - beta) ** 0.5 * signal * x0 + (1 - (1 - beta) * signal ** 2) ** 0.5 * eps
    # both factors are Gaussian in x_{t-1}: the product lies within |eps| deviations of the narrower one, and is narrower still
    narrow = min([spread, signal * x0], [beta / (1 - beta), xt / (1 - beta) ** 0.5])
    grid = narrow[1] + narrow[0] ** 0.5 * np.linspace(-14, 14, 2001)
    log_density = -(xt - (1 - beta) ** 0.5 * grid) ** 2 / (2 * beta) - (grid - signal * x0) ** 2 / (2 * spread)
    weight = np.exp(log_density - log_density.max())
    mean = np.average(grid, weights=weight)
    variance = np.average((grid - mean) ** 2, weights=weight)
    mu_tilde, beta_tilde, log_variance = diffusion.q_posterior(*column([x0, xt]).double()[:, None], torch.tensor([i]))
    # sums of a Gaussian on a uniform grid converge faster than any power: what remains is rounding, 1e-16 over a spread of 1e-4
    np.testing.assert_allclose(mu_tilde.item(), mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose([beta_tilde.item(), math.exp(log_variance)], variance, rtol=1e-7)


@given(schedules)
def test_stepping_back_from_x_t_gives_the_marginal_of_the_step_before(betas):
    """Draw x_t from q(x_t | x_0), then x_{t-1} from the posterior: that is q(x_{t-1} | x_0) of Eq. 2-3."""
    diffusion, t = Diffusion(betas), torch.arange(1, len(betas))
    one, zero = torch.ones(len(t), 1, 1, 1).double(), torch.zeros(len(t), 1, 1, 1).double()
    mean, beta_tilde, _ = diffusion.q_posterior(one, diffusion.q_sample(one, t, zero), t)
    noise = diffusion.q_posterior(zero, diffusion.q_sample(zero, t, one), t)[0]
    assert_close(mean, diffusion.q_sample(one, t - 1, zero), **EXACT)
    assert_close(noise ** 2 + beta_tilde, diffusion.q_sample(zero, t - 1, one) ** 2, **EXACT)


@given(schedules)
def test_posterior_variance_is_below_the_forward_variance(betas):
    diffusion = Diffusion(betas)
    assert (diffusion.beta_tildes < diffusion.betas).all() and (diffusion.beta_tildes[1:] > 0).all()


@given(schedules, shapes, seeds)
def test_posterior_at_the_first_step_is_the_image_itself(betas, shape, seed):
    diffusion, x0, t = Diffusion(betas), normal(*shape, seed=seed), torch.zeros(shape[0], dtype=torch.long)
    mean, variance, log_variance = diffusion.q_posterior(x0, normal(*shape, seed=seed + 1), t)
    assert_close(mean, x0, **EXACT)
    assert (variance == 0).all()
    assert_close(log_variance, torch.full_like(log_variance, math.log(diffusion.beta_tildes[1])), **EXACT)


# What a network predicts

def target_of(diffusion, prediction, x0, eps, t):
    """What the network should output. v is the velocity of x_t as the angle of Eq. 2-3's circle grows: by differences."""
    angle = column(np.arccos(np.sqrt(diffusion.alpha_bars)))[t]
    circle = lambda angle: torch.cos(angle) * x0 + torch.sin(angle) * eps
    h = 1e-4                                                 # central differences err by h^2 / 6 = 2e-9, rounding by 1e-16 / h
    return {"eps": eps, "x0": x0, "v": (circle(angle + h) - circle(angle - h)) / (2 * h)}[prediction]


@given(schedules, predictions, seeds)
def test_the_true_output_says_the_true_image_and_noise(betas, prediction, seed):
    diffusion = Diffusion(betas, prediction)
    x0, eps, t = normal(diffusion.T, 2, 3, 1, seed=seed), normal(diffusion.T, 2, 3, 1, seed=seed + 1), every_step(diffusion)
    x0_pred, eps_pred = diffusion.predict(target_of(diffusion, prediction, x0, eps, t), diffusion.q_sample(x0, t, eps), t)
    assert_close(x0_pred, x0, rtol=1e-8, atol=1e-7)          # 2e-9 from the difference in v, times pixels of size 5
    assert_close(eps_pred, eps, rtol=1e-8, atol=1e-7)


@given(schedules, predictions, seeds)
def test_whatever_is_predicted_solves_the_forward_equation(betas, prediction, seed):
    diffusion = Diffusion(betas, prediction)
    xt, output, t = normal(diffusion.T, 1, 2, 2, seed=seed), normal(diffusion.T, 1, 2, 2, seed=seed + 1), every_step(diffusion)
    x0, eps = diffusion.predict(output, xt, t)
    assert_close(diffusion.q_sample(x0, t, eps), xt, **EXACT)


@given(schedules, predictions, st.sampled_from(["small", "large"]), seeds)
def test_the_reverse_step_of_the_true_output_has_the_posteriors_mean(betas, prediction, variance, seed):
    diffusion = Diffusion(betas, prediction, variance)
    x0, eps, t = normal(diffusion.T, 1, 2, 3, seed=seed), normal(diffusion.T, 1, 2, 3, seed=seed + 1), every_step(diffusion)
    xt = diffusion.q_sample(x0, t, eps)
    mean, *_, x0_pred = diffusion.p_mean_variance(target_of(diffusion, prediction, x0, eps, t), xt, t)
    assert_close(mean, diffusion.q_posterior(x0, xt, t)[0], rtol=1e-8, atol=1e-7)
    assert_close(x0_pred, x0, rtol=1e-8, atol=1e-7)


@given(schedules)
def test_fixed_variances_are_the_posteriors_and_the_forward_steps(betas):
    t, x = torch.arange(1, len(betas)), normal(len(betas) - 1, 1, 1, 1)
    for variance, expected in (("small", Diffusion(betas).beta_tildes), ("large", betas)):
        _, fixed, log_fixed, _ = Diffusion(betas, variance=variance).p_mean_variance(x, x, t)
        assert_close(fixed, column(expected[1:]), **EXACT)
        assert_close(log_fixed.exp(), column(expected[1:]), **EXACT)


@given(schedules)
def test_learned_variance_reaches_from_beta_tilde_to_beta(betas):
    diffusion = Diffusion(betas, variance="learned")
    x, t, low = normal(diffusion.T, 1, 1, 2), every_step(diffusion), diffusion.beta_tildes.copy()
    low[0] = low[1]                                          # beta_tilde is 0 at t = 0
    for interpolation, expected in ((-1, low), (1, betas), (0, np.sqrt(low * betas))):
        _, variance, log_variance, _ = diffusion.p_mean_variance(torch.cat([x, torch.full_like(x, interpolation)], dim=1), x, t)
        assert_close(variance, column(expected).expand_as(x), **EXACT)
        assert_close(log_variance.exp(), variance, **EXACT)


@given(schedules, shapes, predictions, seeds)
def test_learned_variance_leaves_the_mean_alone(betas, shape, prediction, seed):
    x, output, interpolation = (normal(*shape, seed=seed + k) for k in range(3))
    t = torch.full(shape[:1], len(betas) - 1)
    both = torch.cat([output, interpolation], dim=1)
    learned = Diffusion(betas, prediction, "learned").p_mean_variance(both, x, t)
    fixed = Diffusion(betas, prediction, "small").p_mean_variance(output, x, t)
    assert torch.equal(learned[0], fixed[0]) and torch.equal(learned[3], fixed[3])
    assert learned[1].shape == learned[2].shape == x.shape


@given(schedules, predictions, seeds)
def test_clipping_bounds_the_image_and_moves_the_mean_with_it(betas, prediction, seed):
    diffusion, t = Diffusion(betas, prediction), every_step(Diffusion(betas))
    x, output = normal(diffusion.T, 1, 2, 3, seed=seed), 3 * normal(diffusion.T, 1, 2, 3, seed=seed + 1)
    free = diffusion.p_mean_variance(output, x, t)[3]
    mean, *_, x0 = diffusion.p_mean_variance(output, x, t, clip=True)
    assert (x0.abs() <= 1).all() and torch.equal(x0[free.abs() <= 1], free[free.abs() <= 1])
    assert torch.equal(mean, diffusion.q_posterior(x0, x, t)[0])


@given(schedules, predictions, seeds, st.booleans())
def test_a_correction_replaces_the_clipped_image_and_moves_the_mean_with_it(betas, prediction, seed, clip):
    diffusion, t = Diffusion(betas, prediction), every_step(Diffusion(betas))
    x, output = normal(diffusion.T, 1, 2, 3, seed=seed), 3 * normal(diffusion.T, 1, 2, 3, seed=seed + 1)
    before = diffusion.p_mean_variance(output, x, t, clip)[3]
    mean, *_, x0 = diffusion.p_mean_variance(output, x, t, clip, correct=lambda x0: x0.flip(2) + 2)
    assert torch.equal(x0, before.flip(2) + 2) and torch.equal(mean, diffusion.q_posterior(x0, x, t)[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_on_from_the_corrected_image(sampler):
    x0s, target = [], normal(2, 1, 2, 3)
    x = sample(Diffusion(linear_betas(20)), lambda x, t, y: 0.1 * x, (2, 1, 2, 3), sampler=sampler, seeds=[0, 1], clip=True,
               correct=lambda x0: target.clone(), callback=lambda step, x, x0: x0s.append(x0))
    assert all(torch.equal(x0, target) for x0 in x0s)
    assert_close(x.double(), target, rtol=1e-4, atol=1e-4)               # float32 over 20 steps; target lies beyond 1


# Losses

@given(schedules, predictions, seeds, st.floats(-2, 2))
def test_the_simple_loss_is_the_mean_square_of_the_networks_error(betas, prediction, seed, error):
    diffusion = Diffusion(betas, prediction)
    x0, eps, t = normal(diffusion.T, 2, 1, 3, seed=seed), normal(diffusion.T, 2, 1, 3, seed=seed + 1), every_step(diffusion)
    errors = error * column(torch.linspace(0, 1, diffusion.T).double())          # none for the first image, more for the next
    model = lambda x, t, y: target_of(diffusion, prediction, x0, eps, t) + errors
    losses = diffusion.losses(model, x0, t, None, eps)
    assert_close(losses["loss"], errors.flatten() ** 2, rtol=1e-6, atol=1e-7)    # the target of v is good to 1e-8
    assert list(losses) == ["loss", "mse"] and torch.equal(losses["loss"], losses["mse"])


@given(schedules, seeds, st.floats(1, 100))
def test_the_weighted_loss_is_that_of_v_up_to_the_limit_of_the_weight(betas, seed, limit):
    """An error of x0 makes one of v, at the same x_t, which algebra gives: v = (sqrt(alpha_bar) x_t - x0) / sqrt(1 - alpha_bar)."""
    diffusion = Diffusion(betas, "x0")
    x0, eps, t = normal(diffusion.T, 2, 1, 3, seed=seed), normal(diffusion.T, 2, 1, 3, seed=seed + 1), every_step(diffusion)
    guess, xt = normal(diffusion.T, 2, 1, 3, seed=seed + 2), diffusion.q_sample(x0, t, eps)
    a, s = column(torch.tensor(np.sqrt(diffusion.alpha_bars))), column(torch.tensor(np.sqrt(1 - diffusion.alpha_bars)))
    of_v = (((a * xt - guess) / s - (a * eps - s * x0)) ** 2).flatten(1).mean(dim=1)
    simple, limited, unlimited = (diffusion.losses(lambda x, t, y: guess, x0, t, None, eps, weight)["loss"]
                                  for weight in (1, limit, math.inf))
    assert_close(limited, torch.minimum(of_v, limit * simple), rtol=1e-5, atol=1e-7)
    assert_close(unlimited, of_v, rtol=1e-5, atol=1e-7)


def test_the_loss_shows_the_network_the_noised_image_the_original_step_and_the_condition():
    diffusion, seen = Diffusion(linear_betas()).respaced(10), []
    x0, eps, t, y = normal(3, 1, 2, 2), normal(3, 1, 2, 2, seed=1), torch.tensor([0, 4, 9]), torch.tensor([7, 8, 9])
    diffusion.losses(lambda *inputs: seen.append(inputs) or inputs[0], x0, t, y, eps)
    (x, step, condition), = seen
    assert torch.equal(x, diffusion.q_sample(x0, t, eps))
    assert step.tolist() == diffusion.timesteps[[0, 4, 9]].tolist() == [0, 444, 999]
    assert condition is y


@given(schedules, predictions, seeds)
def test_the_bound_trains_the_variance_and_the_simple_loss_the_mean(betas, prediction, seed):
    diffusion = Diffusion(betas, prediction, "learned")
    x0, eps, t = normal(diffusion.T, 1, 2, 2, seed=seed), normal(diffusion.T, 1, 2, 2, seed=seed + 1), every_step(diffusion)
    output = normal(diffusion.T, 2, 2, 2, seed=seed + 2).requires_grad_()
    losses = diffusion.losses(lambda x, t, y: output, x0, t, None, eps)
    of_bound, of_mse, of_loss = (torch.autograd.grad(losses[name].sum(), output, retain_graph=True)[0]
                                 for name in ("vb", "mse", "loss"))
    assert (of_bound[:, :1] == 0).all() and (of_bound[1:, 1:] != 0).all()        # t = 0 cuts off hopeless likelihoods
    assert (of_mse[:, 1:] == 0).all() and (of_mse[:, :1] != 0).all()
    assert_close(of_loss, of_bound + of_mse, **EXACT)


@given(schedules, predictions, seeds)
def test_the_bound_is_never_negative_and_zero_for_the_posterior_alone(betas, prediction, seed):
    diffusion, t = Diffusion(betas, prediction, "learned"), torch.arange(1, len(betas))
    x0, eps, wrong = (normal(len(t), 2, 1, 3, seed=seed + k) for k in range(3))
    xt, true = diffusion.q_sample(x0, t, eps), target_of(diffusion, prediction, x0, eps, t)
    posterior_variance = -torch.ones_like(x0)
    bound = lambda mean, variance: diffusion.variational_bound(torch.cat([mean, variance], dim=1), x0, xt, t)[0]
    assert_close(bound(true, posterior_variance), torch.zeros(len(t)).double(), rtol=0, atol=1e-9)
    assert (bound(true + wrong, posterior_variance) > 0).all() and (bound(true, wrong) > 0).all()


# Likelihood

@given(st.floats(-2, 2), st.floats(-3, 1), st.floats(-2, 2), st.floats(-3, 1))
def test_divergence_of_gaussians_is_its_integral(mean1, log_deviation1, mean2, log_deviation2):
    p, q = (torch.distributions.Normal(mean, math.exp(log)) for mean, log in ((mean1, log_deviation1), (mean2, log_deviation2)))
    grid = mean1 + math.exp(log_deviation1) * torch.linspace(-12, 12, 4001).double()
    step = math.exp(log_deviation1) * 24 / 4000
    integral = (p.log_prob(grid).exp() * (p.log_prob(grid) - q.log_prob(grid))).sum() * step
    kl = normal_kl(*(torch.tensor(x).double() for x in (mean1, 2 * log_deviation1, mean2, 2 * log_deviation2)))
    assert_close(kl, integral, rtol=1e-6, atol=1e-6)         # the distributions hold their parameters in float32
    assert kl > -1e-12


@given(st.floats(-1.2, 1.2), st.floats(-6, 1))
def test_likelihoods_of_the_256_levels_sum_to_one(mean, log_scale):
    levels = torch.arange(256).double() / 127.5 - 1
    log_p = discretized_log_likelihood(levels, torch.tensor(mean).double(), torch.tensor(log_scale).double())
    assert abs(log_p.exp().sum() - 1) < 1e-9                 # the bins telescope; 256 floors of 1e-12 remain


@given(st.floats(-1.2, 1.2), st.floats(-6, 1))
def test_likelihood_of_a_level_is_the_gaussians_mass_around_it(mean, log_scale):
    levels, edges = torch.arange(256).double() / 127.5 - 1, (torch.arange(255).double() + 0.5) / 127.5 - 1
    below = torch.special.ndtr((edges - mean) / math.exp(log_scale))
    mass = torch.cat([below[:1], below.diff(), 1 - below[-1:]])
    log_p = discretized_log_likelihood(levels, torch.tensor(mean).double(), torch.tensor(log_scale).double())
    assert_close(log_p.exp(), mass, rtol=0, atol=5e-4)       # Page's approximation errs by 2e-4 at either edge


def exact_reverse(diffusion, m, s, steps=None):
    """A network whose reverse step is exactly q(x_{t-1} | x_t) of pixels from N(m, s^2): eps, and the variance's place.

    By Bayes: x_{t-1} ~ N(., v), and x_t = sqrt(alpha) x_{t-1} + noise of variance beta, so 1 / variance = 1 / v + alpha / beta.
    """
    process = diffusion if steps is None else diffusion.respaced(steps)
    mean = denoiser(diffusion.betas, {"kind": "gauss", "m": m, "s": s})
    v = np.append(1.0, process.alpha_bars[:-1]) * (s ** 2 - 1) + 1
    variances = 1 / (1 / v[1:] + process.alphas[1:] / process.betas[1:])
    low, high = np.log(process.beta_tildes[1:]), np.log(process.betas[1:])
    interpolation = dict(zip(process.timesteps, np.append(0.0, 2 * (np.log(variances) - low) / (high - low) - 1)))
    return lambda x, t, y: torch.cat([mean(x, t), torch.full_like(x, interpolation[int(t[0])])], dim=1)


def test_each_term_of_the_exact_bound_is_the_information_that_its_step_destroys():
    """KL(q(x_{t-1} | x_t, x_0) || q(x_{t-1} | x_t)) is on average I(x_0; x_{t-1}) - I(x_0; x_t): the chain rule."""
    n, s, diffusion = 400, 0.5, Diffusion(linear_betas(40, 1e-3, 0.3), variance="learned")
    torch.manual_seed(0)
    x0 = 0.2 + s * normal(n, 1, 5, 5)
    vb = diffusion.bits_per_dim(exact_reverse(diffusion, 0.2, s), x0, clip=False)["vb"][:, 1:]
    snr = diffusion.alpha_bars / (1 - diffusion.alpha_bars)
    destroyed = torch.from_numpy(-np.diff(0.5 * np.log2(1 + s ** 2 * snr)))
    assert ((vb.mean(dim=0) - destroyed).abs() < 5 * vb.std(dim=0) / math.sqrt(n)).all()     # 5 standard errors, 39 steps


def levels_and_entropy(m, s, *shape):
    """Pixels from N(m, s^2) rounded to 256 levels, and the entropy of their law in bits."""
    edges = (torch.arange(255).double() + 0.5) / 127.5 - 1
    below = torch.special.ndtr((edges - m) / s)
    p = torch.cat([below[:1], below.diff(), 1 - below[-1:]])
    return (127.5 * (m + s * normal(*shape) + 1)).round().clamp(0, 255) / 127.5 - 1, -(p * p.clamp(min=1e-99).log2()).sum()


def test_bits_per_dimension_bound_the_entropy_of_the_data_from_above_and_closely():
    diffusion = Diffusion(linear_betas(200, 5e-4, 0.1), variance="large")
    x0, entropy = levels_and_entropy(0.1, 0.3, 200, 1, 10, 10)
    torch.manual_seed(0)
    total = diffusion.bits_per_dim(denoiser(diffusion.betas, {"kind": "gauss", "m": 0.1, "s": 0.3}), x0)["total"]
    error = 4 * total.std() / math.sqrt(200)                 # 4 standard errors, below 0.05 bits
    # no code is shorter than the entropy; the fixed variance and the decoder's rounding cost about an eighth of a bit
    assert entropy - error < total.mean() < entropy + 0.2 + error


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_network_that_knows_the_image_pays_for_the_prior_and_the_last_rounding_alone(schedule):
    diffusion, x0 = Diffusion(SCHEDULES[schedule](100), "x0"), (normal(2, 1, 2, 3).clamp(-1, 1) * 127).round() / 127.5
    bits = diffusion.bits_per_dim(lambda x, t, y: x0, x0)
    prior = torch.distributions.kl_divergence(
        torch.distributions.Normal(diffusion.alpha_bars[-1] ** 0.5 * x0, torch.tensor(1 - diffusion.alpha_bars[-1]).sqrt()),
        torch.distributions.Normal(0.0, 1.0)).mean(dim=(1, 2, 3)) / math.log(2)
    half_bin = 1 / 255 / diffusion.beta_tildes[1] ** 0.5
    rounding = -math.log2(math.erf(half_bin / math.sqrt(2)))
    assert_close(bits["prior"], prior, **EXACT)
    assert_close(bits["vb"][:, 1:], torch.zeros(2, 99).double(), **EXACT)
    assert_close(bits["mse"], torch.zeros(2, 100).double(), **EXACT)
    assert_close(bits["vb"][:, 0], torch.full((2,), rounding).double(), rtol=0, atol=2e-3)   # Page's 4e-4 over a mass above 0.3
    assert_close(bits["total"], bits["vb"].sum(dim=1) + bits["prior"], **EXACT)


def test_bits_per_dimension_clip_predictions_beyond_the_range_of_pixels():
    diffusion, x0 = Diffusion(linear_betas(20), "x0"), normal(2, 1, 2, 3).sign()
    bits = diffusion.bits_per_dim(lambda x, t, y: 3 * x0, x0)
    assert_close(bits["vb"][:, 1:], torch.zeros(2, 19).double(), **EXACT)


def test_bits_of_a_step_stand_in_its_column():
    diffusion, x0 = Diffusion(linear_betas(20, 1e-3, 0.3)), normal(2, 1, 2, 3)
    noise = normal(20, 2, 1, 2, 3, seed=1)
    model = lambda x, t, y: noise[t[0]] + 0.5 * (t[0] == 7)              # right but for one step
    bits = diffusion.bits_per_dim(model, x0, noise=noise, clip=False)
    assert_close(bits["mse"], 0.25 * (torch.arange(20) == 7).double().expand(2, 20), **EXACT)
    assert ((bits["vb"][:, 1:] > 1e-9) == (torch.arange(1, 20) == 7)).all()


# Respacing

@st.composite
def respacings(draw):
    """A process and what to respace it to: a count, a list of counts, or a stride."""
    betas = draw(schedules)
    kind = draw(st.sampled_from(["count", "sections", "ddim"]))
    if kind == "count":
        return betas, draw(st.integers(1, len(betas)))
    if kind == "sections":
        return betas, draw(st.lists(st.integers(1, len(betas) // 2), min_size=2, max_size=2))
    return betas, f"ddim{math.ceil(len(betas) / draw(st.integers(1, len(betas))))}"


@given(respacings())
def test_respacing_keeps_alpha_bar_at_the_kept_steps(respacing):
    betas, steps = respacing
    diffusion = Diffusion(betas, "v", "large")
    respaced = diffusion.respaced(steps)
    np.testing.assert_allclose(respaced.alpha_bars, diffusion.alpha_bars[respaced.timesteps], rtol=1e-9, atol=1e-15)
    assert (np.diff(respaced.timesteps) > 0).all()
    assert (respaced.prediction, respaced.variance, respaced.T) == ("v", "large", len(respaced.timesteps))


@given(st.integers(2, 300), st.data())
def test_a_count_is_spread_evenly_from_the_first_step_to_the_last(T, data):
    n = data.draw(st.integers(2, T))
    kept = Diffusion(linear_betas(T)).respaced(n).timesteps
    assert len(kept) == n
    assert (abs(kept - np.linspace(0, T - 1, n)) <= 0.5 + 1e-9).all()


@given(st.integers(2, 300), st.data())
def test_ddim_strides_are_whole_and_start_at_the_first_step(T, data):
    stride = data.draw(st.integers(1, T))
    expected = np.arange(0, T, stride)
    kept = Diffusion(linear_betas(T)).respaced(f"ddim{len(expected)}").timesteps
    assert len(kept) == len(expected) and kept[0] == 0
    assert len(set(np.diff(kept))) <= 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 40))
def test_each_section_gets_its_own_count(counts, extra):
    T = len(counts) * max(counts) + extra
    kept = Diffusion(linear_betas(T)).respaced(counts).timesteps
    sections = np.array_split(np.arange(T), len(counts))                 # NumPy too gives the first ones the extra steps
    assert [np.isin(section, kept).sum() for section in sections] == counts
    assert all(section[0] in kept and (section[-1] in kept or count == 1) for section, count in zip(sections, counts))


@given(schedules, st.data())
def test_respacing_twice_is_respacing_to_the_steps_that_both_keep(betas, data):
    diffusion = Diffusion(betas)
    once = diffusion.respaced(data.draw(st.integers(2, len(betas))))
    twice = once.respaced(data.draw(st.integers(1, once.T)))
    assert set(twice.timesteps) <= set(once.timesteps)
    np.testing.assert_allclose(twice.alpha_bars, diffusion.alpha_bars[twice.timesteps], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("respacing", [10, [2, 3], "ddim20"])
@pytest.mark.parametrize("use", ["sample", "invert", "bits"])
def test_a_respaced_process_shows_the_network_the_original_steps(use, respacing):
    diffusion, model, x = Diffusion(linear_betas(100)), Recorder(lambda x, t, y: 0.1 * x), normal(2, 1, 2, 3)
    respaced = diffusion.respaced(respacing)
    if use == "sample":
        sample(diffusion, model, x.shape, steps=respacing, noise=x)
    else:
        respaced.bits_per_dim(model, x) if use == "bits" else ddim_invert(diffusion, model, x, steps=respacing)
    assert model.steps == respaced.timesteps.tolist()[::-1 if use == "sample" else 1]


# Samplers

RUNS = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("dpm++", 0.0)]


def errors_by_steps(schedule, law, sampler, counts):
    """Mean distance between what the sampler makes of noise and what the exact flow makes of it, for each count of steps.

    Over equal quantiles of one dimension that is the Wasserstein distance between the sampled law and the true one.
    """
    diffusion = Diffusion(SCHEDULES[schedule]())
    noise, image = noise_and_image(diffusion, law)
    model = denoiser(diffusion.betas, law)
    samples = (sample(diffusion, model, noise.shape, sampler=sampler, steps=n, noise=noise) for n in counts)
    return [(x - image).abs().mean().item() for x in samples]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_error_of_ddim_halves_with_twice_the_steps(schedule, law):
    errors = errors_by_steps(schedule, LAWS[law], "ddim", (20, 40, 80))
    # first order; scaled-linear's first step is large (beta = 8.5e-4) and puts a floor of 2e-3 below the error
    assert all(1.55 < more / less < 2.45 for more, less in zip(errors, errors[1:]))
    assert errors[-1] < 0.04


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_error_of_dpm_solver_falls_with_steps(schedule, law):
    errors = errors_by_steps(schedule, LAWS[law], "dpm++", (5, 10, 20, 40))
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < errors[0] / 10 and errors[3] < 0.003              # the first noise level, sqrt(beta_0), sets the floor


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [10, 20])
def test_dpm_solver_comes_nearer_to_the_law_than_ddim_with_as_many_evaluations(steps, schedule):
    for law in LAWS.values():
        ddim, solver = (errors_by_steps(schedule, law, sampler, [steps])[0] for sampler in ("ddim", "dpm++"))
        assert solver < ddim / 2


def solver_error(n, second_order):
    """Error of n steps of `dpm_update`, uniform in the log of signal to noise, along the exact flow of Gaussian data."""
    m, s, log_snrs = 0.3, 0.5, np.linspace(-3, 3, n + 1)
    alpha_bars = 1 / (1 + np.exp(-2 * log_snrs))
    spreads = alpha_bars * s ** 2 + 1 - alpha_bars
    start = x = torch.linspace(-2, 2, 9).double()
    x0_prev = None
    for k in range(n):
        x0 = m + alpha_bars[k] ** 0.5 * s ** 2 * (x - alpha_bars[k] ** 0.5 * m) / spreads[k]
        x = dpm_update(x, x0, x0_prev if second_order else None, log_snrs[[k - 1, k, k + 1]], *alpha_bars[k:k + 2])
        x0_prev = x0
    z = (start - alpha_bars[0] ** 0.5 * m) / spreads[0] ** 0.5           # the flow keeps the standardised x
    return (x - alpha_bars[-1] ** 0.5 * m - spreads[-1] ** 0.5 * z).abs().max().item()


@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_has_its_order(order):
    coarse, fine = solver_error(32, order == 2), solver_error(64, order == 2)
    assert abs(math.log2(coarse / fine) - order) < 0.1       # the next term of the error bends the slope by about h / 2


@given(st.integers(2, 20), seeds)
def test_dpm_solver_of_first_order_is_ddim(steps, seed):
    diffusion = Diffusion(cosine_betas(100))
    respaced, model, x = diffusion.respaced(steps), denoiser(diffusion.betas, MIXTURE), normal(1, 1, 2, 3, seed=seed)
    ddim = [x for _, x, _ in ddim_steps(respaced, reverse_process(respaced, model), x, None)]
    solver = first_order_states(diffusion, model, x, respaced.timesteps[::-1].tolist(), to_zero=False)
    assert_close(torch.stack(solver), torch.stack(ddim[:-1]), **EXACT)


def test_dpm_solver_lands_on_the_last_predicted_image():
    diffusion, states = Diffusion(linear_betas()), []
    noise, model = normal(2, 1, 2, 3), denoiser(linear_betas(), MIXTURE)
    x = sample(diffusion, model, noise.shape, sampler="dpm++", steps=7, noise=noise,
               callback=lambda *state: states.append(state))
    steps, xs, x0s = zip(*states)
    guess, _ = diffusion.predict(model(xs[-2], torch.full((2,), steps[-1])), xs[-2], torch.full((2,), steps[-1]))
    assert torch.equal(x, x0s[-1])
    assert_close(x, guess, **EXACT)


@given(st.integers(1, 1000), st.data())
def test_dpm_solver_nodes_are_distinct_and_fall_from_the_last_step(T, data):
    n = data.draw(st.integers(1, T))
    nodes = dpm_nodes(T, n)
    assert len(nodes) == n and nodes[0] == T - 1 and nodes[-1] >= 0
    assert all(node > after for node, after in zip(nodes, nodes[1:]))


def test_dpm_solver_nodes_crowd_where_little_noise_is_left():
    assert (np.diff(np.diff(dpm_nodes(1000, 20))) >= 0).all()            # steps grow shorter toward t = 0
    assert dpm_nodes(1000, 4) == [999, 562, 250, 62]                     # 999 (1 - i / 4)^2, by hand


@given(schedules, predictions, st.booleans(), seeds)
def test_ddim_with_eta_one_and_ddpm_draw_the_same_trajectory(betas, prediction, clip, seed):
    """Equal mean and equal variance at each step, so equal x from equal noise."""
    diffusion, start = Diffusion(betas, prediction), normal(2, 1, 2, 3, seed=seed)
    reverse = reverse_process(diffusion, lambda x, t: 0.8 * torch.sin(2 * x), clip)      # of any network
    noises = normal(len(betas), 2, 1, 2, 3, seed=seed + 1)
    ddpm, ddim = (torch.stack([x for _, x, _ in steps(diffusion, reverse, start, iter(noises), **eta)])
                  for steps, eta in ((ddpm_steps, {}), (ddim_steps, dict(eta=1.0))))
    assert_close(ddim, ddpm, rtol=1e-6, atol=1e-8)           # a fast step makes x0 of size 1e4 and more, then shrinks it back


@given(schedules, st.floats(0, 1), st.floats(-1, 1))
def test_every_eta_keeps_the_marginals_of_a_known_image(betas, eta, x0):
    """With x_0 known, DDIM's x_{t-1} is Gaussian with Eq. 2-3's mean and variance, whatever eta."""
    diffusion, T = Diffusion(betas, "x0"), len(betas)
    units = torch.eye(T + 1).double().reshape(T + 1, T + 1, 1, 1, 1)     # row k of the batch gets one unit of noise k alone
    start = diffusion.alpha_bars[-1] ** 0.5 * x0 + (1 - diffusion.alpha_bars[-1]) ** 0.5 * units[0]
    reverse = reverse_process(diffusion, lambda x, t: torch.full_like(x, x0))
    trajectory = ddim_steps(diffusion, reverse, start, iter(units[1:-1]), eta)
    xs = torch.stack([x.flatten() for _, x, _ in trajectory])            # (T, T + 1): the last row got none: it is the mean
    mean, variance = xs[:, -1], ((xs - xs[:, -1:]) ** 2).sum(dim=1)      # affine in independent noises: squares add up
    before = torch.from_numpy(np.append(diffusion.alpha_bars[:-1][::-1], 1.0))
    assert_close(mean, before ** 0.5 * x0, **EXACT)
    assert_close(variance, 1 - before, **EXACT)


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_ancestral_sampling_with_the_exact_variance_has_the_moments_of_the_data(steps):
    """The reverse of a Gaussian process is Gaussian, so that few steps are as exact as many if mean and variance are right."""
    n, m, s, diffusion = 100_000, 0.3, 0.5, Diffusion(linear_betas(), variance="learned")
    alpha_bar, first = diffusion.alpha_bars[-1], diffusion.alpha_bars[0]
    torch.manual_seed(0)
    start = alpha_bar ** 0.5 * m + (alpha_bar * s ** 2 + 1 - alpha_bar) ** 0.5 * normal(1, 1, 100, n // 100)
    x = sample(diffusion, exact_reverse(diffusion, m, s, steps), start.shape, steps=steps, noise=start)
    variance = first * s ** 4 / (first * s ** 2 + 1 - first)             # of E[x0 | x_1]: the last step adds no noise
    assert abs(x.mean() - m) < 4 * math.sqrt(variance / n)               # 4 standard errors
    assert abs(x.var() - variance) < 4 * variance * math.sqrt(2 / n)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_fixed_variance_is_exact_for_the_data_that_it_is_made_for(variance):
    """beta_tilde is right if the image is known, beta if pixels follow N(0, 1): x_{t-1} then has its forward variance."""
    n, diffusion = 40_000, Diffusion(linear_betas(20, 1e-3, 0.3), variance=variance)
    law = {"kind": "gauss", "m": 0.7, "s": 0.0} if variance == "small" else {"kind": "gauss", "m": 0.0, "s": 1.0}
    image, noise = law["m"] + law["s"] * normal(1, 1, 100, n // 100), normal(1, 1, 100, n // 100, seed=1)
    start = diffusion.q_sample(image, torch.tensor([19]), noise)
    moments = []
    torch.manual_seed(0)
    sample(diffusion, denoiser(diffusion.betas, law), start.shape, noise=start,
           callback=lambda step, x, x0: moments.append((x.mean().item(), x.var().item())))
    before = diffusion.alpha_bars[:-1][::-1]
    means, variances = before ** 0.5 * law["m"], before * law["s"] ** 2 + 1 - before
    assert (abs([mean for mean, _ in moments[:-1]] - means) < 5 * np.sqrt(variances / n)).all()          # 5 standard errors
    assert (abs([var for _, var in moments[:-1]] - variances) < 5 * variances * math.sqrt(2 / n)).all()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_inverting_an_image_and_sampling_again_returns_it_the_nearer_the_more_steps(schedule, law):
    diffusion, law = Diffusion(SCHEDULES[schedule]()), LAWS[law]
    model, (_, image) = denoiser(diffusion.betas, law), noise_and_image(diffusion, law)
    errors = []
    for steps in (25, 100, 400):
        noise = ddim_invert(diffusion, model, image, steps=steps)
        errors.append((sample(diffusion, model, image.shape, sampler="ddim", steps=steps, noise=noise) - image).abs().mean())
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.03        # first order would be 4 and 16


@pytest.mark.parametrize("law", LAWS)
def test_inversion_finds_the_noise_that_the_exact_flow_comes_from(law):
    diffusion, law = Diffusion(cosine_betas()), LAWS[law]
    noise, image = noise_and_image(diffusion, law)
    model = denoiser(diffusion.betas, law)
    errors = [(ddim_invert(diffusion, model, image, steps=n) - noise).abs().mean() for n in (50, 200, 800)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.02


def test_inversion_ends_in_noise_without_a_trace_of_the_image():
    image = normal(2, 1, 2, 3)                               # one step, known to hold no image: x = sqrt(1 - alpha_bar) eps
    noise = ddim_invert(Diffusion(np.array([0.36]), "x0"), lambda x, t, y: torch.zeros_like(x), image)
    assert_close(noise, image / 0.6, **EXACT)


def test_inversion_ignores_a_learned_variance_and_passes_the_condition():
    betas, image, y = linear_betas(50), normal(2, 3, 2, 1), torch.tensor([1, 2])
    fixed = lambda x, t, y: 0.1 * column(y) * x
    learned = lambda x, t, y: torch.cat([fixed(x, t, y), x], dim=1)
    inverted = ddim_invert(Diffusion(betas, variance="learned"), learned, image, y)
    assert torch.equal(inverted, ddim_invert(Diffusion(betas), fixed, image, y))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("sampler, eta", RUNS)
def test_networks_that_say_the_same_in_noise_image_or_velocity_draw_the_same_image(sampler, eta, clip):
    betas, noise = linear_betas(), normal(21, 2, 1, 2, 3)
    images = [sample(Diffusion(betas, prediction), denoiser(betas, MIXTURE, prediction), noise.shape[1:],
                     sampler=sampler, eta=eta, steps=20, noise=noise, clip=clip) for prediction in ("eps", "x0", "v")]
    assert_close(images[0], images[1], **EXACT)
    assert_close(images[0], images[2], **EXACT)


@pytest.mark.parametrize("steps", [None, 1, 7, 30])
@pytest.mark.parametrize("sampler, eta", RUNS)
def test_steps_count_the_calls_of_the_network_and_their_times_fall(sampler, eta, steps):
    model = Recorder(lambda x, t, y: 0.1 * x)
    sample(Diffusion(linear_betas(30)), model, (2, 1, 2, 3), sampler=sampler, eta=eta, steps=steps)
    assert len(model.calls) == (steps or 30) and {rows for _, rows in model.calls} == {2}
    assert all(step > after for step, after in zip(model.steps, model.steps[1:]))


@pytest.mark.parametrize("steps", [None, 6])
@pytest.mark.parametrize("sampler, eta", RUNS)
def test_the_callback_sees_every_step_down_to_the_result(sampler, eta, steps):
    states = []
    x = sample(Diffusion(linear_betas(12)), lambda x, t, y: 0.1 * x, (1, 1, 2, 3), sampler=sampler, eta=eta, steps=steps,
               callback=lambda *state: states.append(state))
    assert len(states) == (steps or 12)
    assert all(before[0] > after[0] >= 0 for before, after in zip(states, states[1:]))
    assert torch.equal(states[-1][1], x)


@pytest.mark.parametrize("sampler, eta", RUNS)
def test_clipping_bounds_every_predicted_image_and_the_result(sampler, eta):
    x0s = []
    x = sample(Diffusion(linear_betas()), lambda x, t, y: 3 * x, (2, 1, 2, 3), sampler=sampler, eta=eta, steps=15, clip=True,
               callback=lambda step, x, x0: x0s.append(x0))
    assert torch.stack(x0s).abs().max() <= 1
    assert_close(x, x0s[-1], rtol=0, atol=1e-5)              # the last step adds no noise: float32 rounding of the mean


@given(st.sampled_from(RUNS), st.lists(seeds, min_size=2, max_size=4, unique=True), shapes)
def test_a_seeded_image_is_the_same_alone_and_in_a_batch(run, keys, shape):
    diffusion, y = Diffusion(linear_betas(8), variance="learned"), torch.arange(len(keys))
    model = lambda x, t, y: torch.cat([(0.3 + 0.1 * column(y)) * x + 0.001 * column(t), 0.1 * x], dim=1)
    draw = lambda keys, y: sample(diffusion, model, (len(keys), *shape[1:]), y, run[0], eta=run[1], seeds=keys)
    together = draw(keys, y)
    assert together.shape == (len(keys), *shape[1:]) and together.dtype == torch.float32
    for i, key in enumerate(keys):
        assert torch.equal(draw([key], y[i:i + 1])[0], together[i])


def test_seeds_may_be_tuples_and_different_ones_draw_different_images():
    draw = lambda *seeds: sample(Diffusion(linear_betas(4)), lambda x, t, y: 0.1 * x, (len(seeds), 1, 4, 4), seeds=seeds)
    for keys in [(0, 1, 2, 2 ** 40), ((0, 1), (1, 0), (1, 1), (0, 2))]:
        assert torch.pdist(draw(*keys).flatten(1)).min() > 1e-3
        assert torch.equal(draw(*keys), draw(*keys))


def test_a_seed_draws_fresh_noise_at_every_step():
    """Noise that repeated itself would add up in amplitude, not in variance."""
    diffusion, variances = Diffusion(np.full(60, 0.1), "x0"), []         # of an image known to be 0
    sample(diffusion, lambda x, t, y: torch.zeros_like(x), (1, 1, 100, 100), seeds=[3],
           callback=lambda step, x, x0: variances.append(x.var().item()))
    expected = 1 - diffusion.alpha_bars[:-1][::-1]
    assert (abs(variances[:-1] - expected) < 5 * expected * math.sqrt(2 / 10_000)).all()     # 5 standard errors


@pytest.mark.parametrize("sampler, eta", RUNS)
def test_given_noise_decides_the_image(sampler, eta):
    diffusion, noise = Diffusion(linear_betas(6)), normal(7, 2, 1, 2, 3)
    draw = lambda noise: sample(diffusion, lambda x, t, y: 0.1 * x, (2, 1, 2, 3), sampler=sampler, eta=eta, noise=noise)
    assert torch.equal(draw(noise), draw(noise.clone()))
    assert not torch.equal(draw(noise), draw(noise.roll(1, dims=0)))
    assert torch.equal(draw(noise), draw(noise[0])) == (sampler == "dpm++" or sampler == "ddim" and eta == 0)


def test_sampling_starts_from_standard_normal_noise():
    start, xs = Diffusion(np.array([0.5]), "x0"), []
    torch.manual_seed(0)
    sample(start, lambda x, t, y: xs.append(x) or x, (1, 1, 100, 400))
    assert abs(xs[0].mean()) < 4 / 200 and abs(xs[0].var() - 1) < 4 * math.sqrt(2) / 200     # 4 standard errors, 40,000 pixels


def test_sampling_keeps_no_gradients():
    weight = torch.ones((), requires_grad=True)
    model = lambda x, t, y: 0.1 * weight * x
    assert not sample(Diffusion(linear_betas(3)), model, (1, 1, 2, 2)).requires_grad
    assert not ddim_invert(Diffusion(linear_betas(3)), model, normal(1, 1, 2, 2)).requires_grad


# Guidance

NULL = 9


def conditional(betas, prediction="eps", s=0.4):
    """The exact network of labels y, whose pixels follow N(y / 2, s^2), and of the null label, N(0, s^2)."""
    def model(x, t, y):
        means = [0.0 if label == NULL else label / 2 for label in y.tolist()]
        return torch.cat([denoiser(betas, {"kind": "gauss", "m": m, "s": s}, prediction)(x[i:i + 1], t[i:i + 1])
                          for i, m in enumerate(means)])
    return model


def labelled_output(x, t, y):
    """An arbitrary network of labels, with a learned variance."""
    return torch.cat([torch.sin(x + column(y)), torch.cos(x - column(y))], dim=1)


def test_guidance_of_scale_one_is_no_guidance():
    model, x, y = Recorder(labelled_output), normal(3, 2, 1, 4), torch.tensor([1, 2, 3])
    t = torch.full((3,), 5)
    assert torch.equal(guided(model, y, torch.full_like(y, NULL), 1.0)(x, t), labelled_output(x, t, y))
    assert model.calls == [(5, 3)]


def test_what_autocast_rounds_is_guided_and_split_in_the_type_of_the_images():
    def rounded(x, t, y):
        return labelled_output(x, t, y).bfloat16()
    x, y, t = normal(3, 2, 1, 4), torch.tensor([1, 2, 3]), torch.tensor([0, 5, 9])
    null = torch.full_like(y, NULL)
    found = guided(rounded, y, null, 3.0)(x, t)
    assert_close(found, guided(lambda *z: rounded(*z).to(x.dtype), y, null, 3.0)(x, t), **EXACT)
    process = Diffusion(linear_betas(10), variance="learned")
    assert all(part.dtype == x.dtype for part in process.split(rounded(x, t, y), x))
    assert sample(process, rounded, x.shape, y, noise=x, steps=3).dtype == x.dtype


def test_guidance_of_scale_zero_ignores_the_condition():
    x, y, t = normal(3, 2, 1, 4), torch.tensor([1, 2, 3]), torch.tensor([0, 5, 9])
    null = torch.full_like(y, NULL)
    assert_close(guided(labelled_output, y, null, 0.0)(x, t)[:, :2], labelled_output(x, t, null)[:, :2], **EXACT)


@given(st.floats(-3, 10), st.floats(-3, 10), shapes, seeds)
def test_guidance_is_affine_in_its_scale(scale1, scale2, shape, seed):
    x, y, t = normal(*shape, seed=seed), torch.arange(shape[0]), torch.zeros(shape[0], dtype=torch.long)
    output = lambda scale: guided(labelled_output, y, torch.full_like(y, NULL), scale)(x, t)
    assert_close(output(scale1) + output(scale2), 2 * output((scale1 + scale2) / 2), **EXACT)


def test_guidance_leaves_the_learned_variance_conditional():
    x, y, t = normal(3, 2, 1, 4), torch.tensor([1, 2, 3]), torch.tensor([0, 5, 9])
    output = guided(labelled_output, y, torch.full_like(y, NULL), 3.0)(x, t)
    assert torch.equal(output[:, 2:], labelled_output(x, t, y)[:, 2:])


def test_guidance_of_some_channels_leaves_the_others_conditional():
    x, y, t = normal(2, 4, 1, 3), torch.tensor([1, 2]), torch.tensor([0, 5])
    null = torch.full_like(y, NULL)
    three, every = (guided(labelled_output, y, null, 3.0, channels)(x, t) for channels in (3, None))
    assert torch.equal(three[:, :3], every[:, :3])
    assert torch.equal(three[:, 3:], labelled_output(x, t, y)[:, 3:])


def test_guidance_interval_bounds_are_included_and_one_evaluation_is_made_outside():
    model = Recorder(labelled_output)
    sample(Diffusion(linear_betas(), variance="learned"), model, (2, 1, 2, 2), torch.tensor([1, 2]), "ddim", "ddim10",
           y_null=NULL, cfg_scale=2.0, cfg_interval=(300, 700))          # original steps 900, 800 ... 0
    assert model.calls == [(step, 4 if 300 <= step <= 700 else 2) for step in range(900, -1, -100)]


def test_guidance_interval_leaves_the_condition_alone_outside():
    process, x, y = Diffusion(linear_betas(9), variance="learned"), normal(2, 2, 1, 3), torch.tensor([1, 2])
    limited, unlimited, plain = (begin(process, labelled_output, x.shape, y, y_null=NULL, noise=x, **options)[2] for options in
                                 (dict(cfg_scale=2.0, cfg_interval=(3, 5)), dict(cfg_scale=2.0), {}))
    for step in range(9):
        expected = unlimited if 3 <= step <= 5 else plain
        assert torch.equal(limited(x, step)[0], expected(x, step)[0])


@pytest.mark.parametrize("sampler, eta", RUNS)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_guidance_of_equal_gaussians_samples_the_gaussian_beyond(prediction, sampler, eta):
    """The mean of N(m, s^2) enters each prediction linearly, so scale w moves it from 0 to w m."""
    betas, noise, scale = linear_betas(), normal(11, 2, 1, 2, 3), 1.8
    diffusion, options = Diffusion(betas, prediction), {"sampler": sampler, "eta": eta, "steps": 10, "noise": noise}
    shape, y, beyond = (2, 1, 2, 3), torch.tensor([1, 1]), {"kind": "gauss", "m": scale / 2, "s": 0.4}
    image = sample(diffusion, conditional(betas, prediction), shape, y, cfg_scale=scale, y_null=NULL, **options)
    assert_close(image, sample(diffusion, denoiser(betas, beyond, prediction), shape, **options), **EXACT)


def test_each_image_is_guided_to_its_own_label():
    diffusion, noise, y = Diffusion(cosine_betas()), normal(3, 1, 2, 3), torch.tensor([-1, 0, 2])
    draw = lambda noise, y: sample(diffusion, conditional(diffusion.betas), noise.shape, y, "dpm++", 15,
                                   cfg_scale=1.5, y_null=NULL, noise=noise)
    assert_close(draw(noise, y), torch.cat([draw(noise[i:i + 1], y[i:i + 1]) for i in range(3)]), **EXACT)


@pytest.mark.parametrize("batched", [False, True])
def test_an_unconditional_context_is_repeated_for_each_image(batched):
    contexts, y, null = [], normal(3, 5, 2), normal(5, 2, seed=1)
    model = lambda x, t, y: contexts.append(y) or 0.1 * x
    sample(Diffusion(linear_betas(2)), model, (3, 1, 2, 2), y, cfg_scale=2.0, y_null=null.expand(3, 5, 2) if batched else null)
    assert all(torch.equal(context, torch.cat([y, null.expand(3, 5, 2)])) for context in contexts) and len(contexts) == 2


def test_the_unconditional_label_defaults_to_the_networks_own():
    class Network(torch.nn.Module):
        null_label = NULL

        def forward(self, x, t, y):
            labels.append(y.tolist())
            return 0.1 * x
    labels, y = [], torch.tensor([1, 2])
    sample(Diffusion(linear_betas(1)), Network(), (2, 1, 2, 2), y, cfg_scale=2.0)
    sample(Diffusion(linear_betas(1)), Network(), (2, 1, 2, 2), y, cfg_scale=2.0, y_null=0)
    assert labels == [[1, 2, NULL, NULL], [1, 2, 0, 0]]


# What is refused

X, DIFFUSION = torch.zeros(2, 1, 2, 3), Diffusion(linear_betas(10))


def draw(**options):
    return sample(DIFFUSION, lambda x, t, y: 0.1 * x, (2, 1, 2, 3), **options)


@pytest.mark.parametrize("t", [[0, -1], [10, 0]])
@pytest.mark.parametrize("use", [
    lambda t: DIFFUSION.q_sample(X, t, X), lambda t: DIFFUSION.q_step(X, t, X), lambda t: DIFFUSION.q_posterior(X, X, t),
    lambda t: DIFFUSION.predict(X, X, t), lambda t: DIFFUSION.p_mean_variance(X, X, t), lambda t: DIFFUSION.original(t),
    lambda t: DIFFUSION.losses(lambda x, t, y: x, X, t, None, X)],
    ids=["q_sample", "q_step", "q_posterior", "predict", "p_mean_variance", "original", "losses"])
def test_steps_outside_the_schedule_are_refused(use, t):
    with pytest.raises(IndexError, match="0 .. 9"):
        use(torch.tensor(t))


@pytest.mark.parametrize("t", [3, [3], [3, 3, 3], [[3], [3]]], ids=str)
def test_a_step_for_each_image_is_demanded(t):
    with pytest.raises(ValueError, match="batch of 2"):
        DIFFUSION.q_sample(X, torch.tensor(t), X)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.0], [-0.1], [0.1, math.nan], [[0.1, 0.2]]], ids=str)
def test_variances_outside_zero_to_one_are_refused(betas):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Diffusion(betas)


@pytest.mark.parametrize("options", [{"prediction": "noise"}, {"variance": "huge"}], ids=str)
def test_unknown_predictions_and_variances_are_refused(options):
    with pytest.raises(ValueError, match="must be one of"):
        Diffusion(linear_betas(10), **options)


@pytest.mark.parametrize("steps", [0, 11, -1, "ddim0", "ddim11", "ddim7", "ddimx", "fast", "5", [6, 5], [0, 5], []], ids=str)
def test_impossible_respacings_are_refused(steps):
    with pytest.raises(ValueError):
        DIFFUSION.respaced(steps)


@pytest.mark.parametrize("options, message", [
    ({"sampler": "euler"}, "unknown sampler"),
    ({"steps": 11}, "cannot take 11 steps out of 10"), ({"steps": 0}, "cannot take 0"),
    ({"steps": 11, "sampler": "dpm++"}, "cannot take 11 steps"), ({"steps": 0, "sampler": "dpm++"}, "cannot take 0"),
    ({"cfg_scale": 2.0, "y": torch.tensor([1, 2])}, "unconditional"), ({"cfg_scale": 2.0, "y_null": 3}, "unconditional"),
    ({"seeds": [1]}, "1 seeds for 2 images"), ({"seeds": [1, 2, 3]}, "3 seeds for 2 images"),
    ({"seeds": [1, 2, 3], "noise": torch.zeros(2, 1, 2, 3)}, "3 seeds for 2 images"),
    ({"noise": torch.zeros(1, 1, 2, 3)}, "noise of shape"), ({"noise": torch.zeros(11, 2, 1, 3, 2)}, "noise of shape"),
    ({"noise": torch.zeros(4, 2, 1, 2, 3)}, "noise of 4 rows"), ({"cfg_channels": 2}, "guidance on 2 channels, where x has 1"),
    ({"eta": 0.5}, "eta is a setting of ddim, not of ddpm"), ({"eta": 0.5, "sampler": "dpm++"}, "eta is a setting of ddim"),
    ({"steps": "ddim5", "sampler": "dpm++"}, "cannot take 'ddim5' steps")],
    ids=lambda value: value if isinstance(value, str) else ",".join(value))
def test_sampling_refuses_what_it_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        draw(**options)


@pytest.mark.parametrize("variance, channels", [("small", 2), ("large", 2), ("learned", 1)])
def test_a_network_of_the_wrong_channels_is_refused_even_for_grey_images(variance, channels):
    diffusion, model = Diffusion(linear_betas(10), variance=variance), lambda x, t, y: x.repeat(1, channels, 1, 1)
    with pytest.raises(ValueError, match="channels"):
        sample(diffusion, model, X.shape)
    with pytest.raises(ValueError, match="channels"):
        diffusion.losses(model, X, torch.zeros(2, dtype=torch.long), None, X)


def test_generators_of_keys_that_differ_in_zeros_only_differ():
    keys = [0, (0, 0), 1, (1, 0), (1, 0, 0), (0, 1)]
    draws = {torch.randint(1 << 60, (1,), generator=keyed_generator(key)).item() for key in keys}
    assert len(draws) == len(keys)


def test_a_network_in_bfloat16_has_its_bound_computed_in_float32():
    torch.manual_seed(0)
    diffusion = Diffusion(linear_betas(), variance="learned")
    x0, eps, halves = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t = torch.tensor([1, 100, 500])
    output = torch.cat([eps, halves], dim=1).bfloat16()
    coarse, fine = (diffusion.losses(lambda x, t, y: z, x0, t, None, eps) for z in (output, output.float()))
    assert all(torch.equal(coarse[term], fine[term]) and coarse[term].dtype == torch.float32 for term in fine)
