"""Denoising diffusion: the forward and reverse processes, losses, likelihood, samplers and guidance.

Report §2-1 and §3 (improved sampling, guidance). In `Diffusion` stand Eq. 2-1 … 2-4 (forward), 2-7 (reverse) and 2-8 … 2-11
(posterior), in this order; Eq. 2-6, the chain of reverse steps, is `ddpm_steps`, and Eq. 2-5, where it begins, `begin`.
Papers: Ho et al. 2020 (DDPM); Nichol & Dhariwal 2021 (cosine schedule, learned variance, respacing); Song et al. 2021 (DDIM);
Ho & Salimans 2022 (guidance); Salimans & Ho 2022 (v-prediction); Lu et al. 2022 (DPM-Solver++).

Time: the report counts t = 1 … T, the code 0 … T-1; the report's t is t + 1 here. Symbols are the report's:
alpha = 1 - beta, and alpha_bar is the product of the alphas so far. Images x are (N, C, H, W) float32, pixels in [-1, 1] or
scaled latents; t is (N,) int64. A model is any callable model(x, t, y) that returns a prediction like x, on which a learned
variance follows as C more channels. It always receives the original step, also under respacing.
"""
import math
from itertools import accumulate

import numpy as np
import torch


def linear_betas(T=1000, start=1e-4, end=0.02):
    """Variances rising linearly, Ho et al. 2020, section 4. Not rescaled with T."""
    return np.linspace(start, end, T, dtype=np.float64)


def cosine_betas(T=1000):
    """alpha_bar falls as a squared cosine, Nichol & Dhariwal 2021, Eq. 17."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2      # 0.008 keeps the first beta from vanishing
    return np.minimum(1 - f[1:] / f[:-1], 0.999)                             # the last would be 1: no way back


def scaled_linear_betas(T=1000, start=0.00085, end=0.012):
    """Standard deviations rising linearly, as in latent diffusion; the ends are Stable Diffusion's. Not rescaled with T."""
    return np.linspace(start ** 0.5, end ** 0.5, T, dtype=np.float64) ** 2


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas, "scaled-linear": scaled_linear_betas}
PREDICTIONS = ("eps", "x0", "v")
VARIANCES = ("small", "large", "learned")
SAMPLERS = ("ddpm", "ddim", "dpm++")


def mean_flat(x):
    """Mean over all dimensions but the first: (N, ...) -> (N,)."""
    return x.flatten(1).mean(dim=1)


def normal_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N(mean1, var1) || N(mean2, var2)) of each element, in nats."""
    return 0.5 * (log_variance2 - log_variance1 - 1 + torch.exp(log_variance1 - log_variance2)
                  + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretized_log_likelihood(x, mean, log_scale):
    """log of a Gaussian's mass on x's bin among 256 levels of [-1, 1], in nats per element.  Ho et al. 2020, Eq. 13.

    The outermost bins reach to infinity. cdf is Page's approximation by tanh, on which the published likelihoods rest.
    """
    def cdf(z):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
    half_bin, inverse_scale = 1 / 255, torch.exp(-log_scale)
    upper = cdf((x - mean + half_bin) * inverse_scale)
    lower = cdf((x - mean - half_bin) * inverse_scale)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


class Diffusion:
    """A forward process, Eq. 2-1, and what a network must predict to reverse it.

    betas (T,) in (0, 1). prediction: what the network outputs, the noise "eps", the image "x0", or
    "v" = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0. variance of the reverse step: "small" is beta_tilde, "large" is beta,
    "learned" interpolates between their logarithms. The tables .betas .alphas .alpha_bars .beta_tildes are float64 arrays of
    length T. timesteps (T,) are the times passed to the model, 0 .. T-1 by default; released weights may count
    otherwise. ValueError on unknown names or betas outside (0, 1).
    """

    def __init__(self, betas, prediction="eps", variance="small", timesteps=None):
        if prediction not in PREDICTIONS or variance not in VARIANCES:
            raise ValueError(f"prediction must be one of {PREDICTIONS} and variance one of {VARIANCES}: "
                             f"got {prediction!r} and {variance!r}")
        self.betas = np.asarray(betas, dtype=np.float64)
        if self.betas.ndim != 1 or len(self.betas) == 0 or not ((0 < self.betas) & (self.betas < 1)).all():
            raise ValueError("betas must be a sequence of numbers between 0 and 1")
        self.prediction, self.variance, self.T = prediction, variance, len(self.betas)
        self.timesteps = np.arange(self.T) if timesteps is None else np.asarray(timesteps)
        self.alphas = 1 - self.betas
        self.alpha_bars = np.cumprod(self.alphas)                                                    # Eq. 2-3, by Eq. 2-4
        self.alpha_bars_prev = np.append(1.0, self.alpha_bars[:-1])
        self.beta_tildes = (1 - self.alpha_bars_prev) / (1 - self.alpha_bars) * self.betas           # Eq. 2-10
        # beta_tilde is 0 at t = 0, where no noise is added: its logarithm is that of t = 1, and so is the "large" variance's
        first = self.beta_tildes[1] if self.T > 1 else self.betas[0]
        small, large = np.append(first, self.beta_tildes[1:]), np.append(first, self.betas[1:])
        self.tables = {name: torch.tensor(table) for name, table in {
            "sqrt_alpha": np.sqrt(self.alphas), "sqrt_beta": np.sqrt(self.betas),
            "sqrt_alpha_bar": np.sqrt(self.alpha_bars), "sqrt_one_minus_alpha_bar": np.sqrt(1 - self.alpha_bars),
            "log_one_minus_alpha_bar": np.log1p(-self.alpha_bars),
            # Eq. 2-11, corrected: see REPORT.md
            "posterior_x0": np.sqrt(self.alpha_bars_prev) * self.betas / (1 - self.alpha_bars),
            "posterior_xt": np.sqrt(self.alphas) * (1 - self.alpha_bars_prev) / (1 - self.alpha_bars),
            "beta_tilde": self.beta_tildes,
            "log_beta_tilde": np.log(small), "log_beta": np.log(self.betas),
            "fixed_variance": large if variance == "large" else self.beta_tildes,
            "fixed_log_variance": np.log(large if variance == "large" else small),
            "timestep": self.timesteps,
        }.items()}

    def at(self, name, t, x):
        """Row t (N,) of a table as (N, 1, 1, 1), to broadcast over x and in its dtype. IndexError outside 0 .. T-1."""
        table = self.tables[name]
        if table.device != x.device:
            table = self.tables[name] = table.to(x.device)               # moved once, not at every step
        if t.shape != x.shape[:1]:
            raise ValueError(f"t of shape {tuple(t.shape)} for a batch of {len(x)}: it must be (N,)")
        if t.device.type == "cpu" and ((t < 0) | (t >= self.T)).any():   # on a GPU the check would wait for it
            raise IndexError(f"t must lie in 0 .. {self.T - 1}")
        return table[t].to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))

    def original(self, t):
        """The time that the model is told at t (N,), from .timesteps: after `respaced` the original steps."""
        return self.at("timestep", t, t.to(self.tables["timestep"].dtype))

    def q_step(self, x_prev, t, eps):
        """One forward step: sample x_t from q(x_t | x_{t-1}).  Eq. 2-1; eps standard normal, like x_prev."""
        return self.at("sqrt_alpha", t, x_prev) * x_prev + self.at("sqrt_beta", t, x_prev) * eps

    def q_sample(self, x0, t, eps):
        """All forward steps at once: sample x_t from q(x_t | x_0).  Eq. 2-3, which Eq. 2-2 and 2-4 merge from Eq. 2-1.

        x0 (N, C, H, W); t (N,) int64; eps like x0, standard normal. Returns x_t like x0.
        """
        return self.at("sqrt_alpha_bar", t, x0) * x0 + self.at("sqrt_one_minus_alpha_bar", t, x0) * eps

    def predict(self, output, xt, t):
        """x0 and eps that a network's output (without its variance half) means at x_t.  Both solve Eq. 2-3."""
        a, s = self.at("sqrt_alpha_bar", t, xt), self.at("sqrt_one_minus_alpha_bar", t, xt)
        if self.prediction == "eps":
            return (xt - s * output) / a, output
        if self.prediction == "x0":
            return output, (xt - a * output) / s
        return a * xt - s * output, a * output + s * xt                  # v = a eps - s x0: a rotation, which inverts itself

    def split(self, output, x):
        """Split a network's output for x (N, C, H, W) -> prediction (N, C, H, W), and the variance's interpolation or None.

        ValueError if it does not have C channels, or 2C where the variance is learned.
        """
        halves = 2 if self.variance == "learned" else 1
        if output.shape != (len(x), halves * x.shape[1], *x.shape[2:]):
            raise ValueError(f"the network returned {tuple(output.shape)} for x of {tuple(x.shape)}, where variance "
                             f"{self.variance!r} needs {halves} x {x.shape[1]} channels")
        output = output.to(x.dtype)                      # autocast's bfloat16 is too coarse for what follows
        return output.chunk(2, dim=1) if halves == 2 else (output, None)

    def p_mean_variance(self, output, xt, t, clip=False, correct=None):
        """The reverse step p(x_{t-1} | x_t), Eq. 2-7 -> mean, variance, log variance, x0.

        output (N, C or 2C, H, W) as the network returns it. The mean is Eq. 2-11 at the predicted x0, which clip clamps to
        [-1, 1] and the function `correct` replaces, in this order. Variances are (N, 1, 1, 1), or like x where they are learned.
        """
        prediction, interpolation = self.split(output, xt)
        if interpolation is not None:
            fraction = (interpolation + 1) / 2                                       # Nichol & Dhariwal 2021, Eq. 15
            log_variance = fraction * self.at("log_beta", t, xt) + (1 - fraction) * self.at("log_beta_tilde", t, xt)
            variance = log_variance.exp()
        else:
            variance, log_variance = self.at("fixed_variance", t, xt), self.at("fixed_log_variance", t, xt)
        x0, _ = self.predict(prediction, xt, t)
        x0 = x0.clamp(-1, 1) if clip else x0
        x0 = x0 if correct is None else correct(x0)
        return self.q_posterior(x0, xt, t)[0], variance, log_variance, x0

    def q_posterior(self, x0, xt, t):
        """q(x_{t-1} | x_t, x_0), Eq. 2-8, by Bayes' rule, Eq. 2-9 -> mean mu_tilde, variance beta_tilde, and its logarithm.

        The mean is like xt, the others are (N, 1, 1, 1); the logarithm at t = 0 is that of t = 1.
        """
        mu_tilde = self.at("posterior_x0", t, xt) * x0 + self.at("posterior_xt", t, xt) * xt         # Eq. 2-11
        return mu_tilde, self.at("beta_tilde", t, xt), self.at("log_beta_tilde", t, xt)              # Eq. 2-10

    def variational_bound(self, output, x0, xt, t, clip=False):
        """L_t of Ho et al. 2020, Eq. 5, (N,) in bits per dimension -> that term, and the predicted x0.

        For t > 0 it is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at t = 0, -log p(x_0 | x_1) of 8-bit pixels.
        """
        mean, _, log_variance, x0_pred = self.p_mean_variance(output, xt, t, clip)
        true_mean, _, true_log_variance = self.q_posterior(x0, xt, t)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, mean, log_variance))
        nll = -mean_flat(discretized_log_likelihood(x0, mean, 0.5 * log_variance))
        return torch.where(t == 0, nll, kl) / math.log(2), x0_pred

    def losses(self, model, x0, t, y, eps, max_weight=1.0):
        """The simple loss, Ho et al. 2020, Eq. 14, or with learned variance the hybrid one, Nichol & Dhariwal 2021, Eq. 16.

        Returns a dict of (N,): "mse", with learned variance "vb", the bound's term in bits per dimension, and their sum "loss".
        The paper's weight 0.001 of the bound's sum over 1000 steps is the weight 1 of its mean, that of one random step.
        max_weight limits a weight 1 / (1 - alpha_bar) of x0's "mse"; without a limit that is v's (Salimans & Ho 2022, section 4).
        """
        xt = self.q_sample(x0, t, eps)
        prediction, interpolation = self.split(model(xt, self.original(t), y), x0)
        a, s = self.at("sqrt_alpha_bar", t, x0), self.at("sqrt_one_minus_alpha_bar", t, x0)
        target = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[self.prediction]
        terms = {"mse": mean_flat((prediction - target) ** 2)}
        if self.prediction == "x0" and max_weight > 1:
            terms["mse"] = terms["mse"] * (1 / s.flatten() ** 2).clamp(max=max_weight)
        if interpolation is not None:
            frozen = torch.cat([prediction.detach(), interpolation], dim=1)          # the bound trains the variance only
            terms["vb"], _ = self.variational_bound(frozen, x0, xt, t)
        return {"loss": sum(terms.values()), **terms}

    @torch.no_grad()
    def bits_per_dim(self, model, x0, y=None, noise=None, clip=True):
        """The variational bound on -log2 p(x0) per dimension, all T terms.  Ho et al. 2020, Eq. 5; x0 (N, C, H, W) pixels.

        noise (T, N, C, H, W) replaces the random eps, row t for step t. Returns total and prior (N,), and vb and mse
        (N, T), column t for step t; mse is that of eps.
        """
        vb, mse = [], []
        for i in range(self.T):
            t = torch.full((len(x0),), i, device=x0.device)
            eps = torch.randn_like(x0) if noise is None else noise[i]
            xt = self.q_sample(x0, t, eps)
            term, x0_pred = self.variational_bound(model(xt, self.original(t), y), x0, xt, t, clip)
            eps_pred = (xt - self.at("sqrt_alpha_bar", t, xt) * x0_pred) / self.at("sqrt_one_minus_alpha_bar", t, xt)
            vb.append(term)
            mse.append(mean_flat((eps_pred - eps) ** 2))
        last, zero = torch.full((len(x0),), self.T - 1, device=x0.device), torch.zeros_like(x0)
        prior = mean_flat(normal_kl(self.at("sqrt_alpha_bar", last, x0) * x0,
                                    self.at("log_one_minus_alpha_bar", last, x0), zero, zero)) / math.log(2)
        vb, mse = torch.stack(vb, dim=1), torch.stack(mse, dim=1)        # (N, T)
        return {"total": vb.sum(dim=1) + prior, "prior": prior, "vb": vb, "mse": mse}

    def respaced(self, steps):
        """A Diffusion over a subset of the steps with the same alpha_bar there.  Nichol & Dhariwal 2021, section 4.

        steps: a count, spread evenly from the first step to the last; a list of counts, one for each of as many equal sections;
        or "ddimN", N steps at a constant stride from step 0. ValueError if there are not so many.
        """
        kept = kept_steps(self.T, steps)
        alpha_bars = self.alpha_bars[kept]
        betas = 1 - alpha_bars / np.append(1.0, alpha_bars[:-1])
        return Diffusion(betas, self.prediction, self.variance, self.timesteps[kept])


def kept_steps(T, steps):
    """Indices of the steps that `Diffusion.respaced` keeps, rising."""
    if isinstance(steps, str):
        stride = next((stride for stride in range(1, T + 1) if steps == f"ddim{len(range(0, T, stride))}"), None)
        if stride is None:
            raise ValueError(f"steps {steps!r} is neither a count, nor a list of counts, nor 'ddimN' where a whole stride over {T} "
                             "steps takes N of them")
        return list(range(0, T, stride))
    counts = [steps] if isinstance(steps, (int, np.integer)) else steps
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = T // len(counts) + (i < T % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"cannot take {count} steps out of {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1
        places = accumulate([stride] * (count - 1), initial=0.0)         # summed as in OpenAI's code, so that roundings fall alike
        kept += [start + round(place) for place in places]
        start += size
    return kept


def guided(model, y, y_null, scale, channels=None):
    """Classifier-free guidance (§3) as a callable(x, t): one batch holds both halves.  Ho & Salimans 2022, Eq. 6.

    uncond + scale (cond - uncond) on all channels of the prediction, or on the first `channels` only; a learned variance
    stays the conditional one. Since eps, x0 and v are affine in each other, guiding one guides all.
    """
    def model_with_guidance(x, t):
        if scale == 1:
            return model(x, t, y)
        output = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y_null])).to(x.dtype)     # (2N, C or 2C, H, W)
        conditional, unconditional = output.chunk(2)
        n = x.shape[1] if channels is None else channels
        prediction = unconditional[:, :n] + scale * (conditional[:, :n] - unconditional[:, :n])
        return torch.cat([prediction, conditional[:, n:]], dim=1)
    return model_with_guidance


def reverse_process(diffusion, model, clip=False, correct=None):
    """p(x_{t-1} | x_t), Eq. 2-7, as a callable(x, i), i the same step for all images: what `Diffusion.p_mean_variance` returns."""
    def reverse(x, i):
        t = torch.full((len(x),), i, device=x.device)
        return diffusion.p_mean_variance(model(x, diffusion.original(t)), x, t, clip, correct)
    return reverse


def ddpm_steps(diffusion, reverse, x, noises):
    """Ancestral sampling, Ho et al. 2020, algorithm 2: the chain of Eq. 2-6, from x = x_T.  Yields step, x_{t-1}, x0."""
    for i in reversed(range(diffusion.T)):
        mean, _, log_variance, x0 = reverse(x, i)
        x = mean + (0.5 * log_variance).exp() * next(noises) if i > 0 else mean          # the last step adds no noise
        yield diffusion.timesteps[i], x, x0


def ddim_steps(diffusion, reverse, x, noises, eta=0.0):
    """Song et al. 2021, Eq. 12 and 16: deterministic for eta = 0, DDPM's moments for eta = 1.  Otherwise as `ddpm_steps`."""
    for i in reversed(range(diffusion.T)):
        *_, x0 = reverse(x, i)
        alpha_bar, alpha_bar_prev = diffusion.alpha_bars[i], diffusion.alpha_bars_prev[i]
        eps = (x - alpha_bar ** 0.5 * x0) / (1 - alpha_bar) ** 0.5                       # Eq. 2-3 at this x0
        sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)) ** 0.5
        x = alpha_bar_prev ** 0.5 * x0 + max(1 - alpha_bar_prev - sigma ** 2, 0) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * next(noises)
        yield diffusion.timesteps[i], x, x0


def dpm_nodes(T, n):
    """n distinct steps of DPM-Solver++, falling from T-1: dense where little noise is left, where the path bends most."""
    nodes, last = [], -1
    for i in reversed(range(n)):
        last = max(round((T - 1) * (1 - i / n) ** 2), last + 1)
        nodes.append(last)
    return nodes[::-1]


def dpm_update(x, x0, x0_prev, log_snrs, alpha_bar, alpha_bar_next):
    """One step of DPM-Solver++(2M), Lu et al. 2022, algorithm 2, from noise level alpha_bar to alpha_bar_next.

    x0 is predicted at x, x0_prev at the node before; log_snrs = lambda = log(alpha / sigma) at (before, here, next).
    With x0_prev=None the step is of first order: DDIM's.
    """
    before, here, after = log_snrs
    h = after - here
    if x0_prev is not None:
        x0 = x0 + 0.5 * h / (here - before) * (x0 - x0_prev)             # extrapolate x0 to the middle of the step
    return ((1 - alpha_bar_next) / (1 - alpha_bar)) ** 0.5 * x - alpha_bar_next ** 0.5 * math.expm1(-h) * x0


def dpm_steps(diffusion, reverse, x, nodes):
    """DPM-Solver++(2M) over falling nodes, then a first-order step to no noise, where x = x0.  Yields step, x, x0."""
    alpha_bars = [diffusion.alpha_bars[i] for i in nodes]
    log_snrs = [0.5 * math.log(alpha_bar / (1 - alpha_bar)) for alpha_bar in alpha_bars]
    x0_prev = None                                       # log_snrs[-1], at k = 0, is then not used
    for k, i in enumerate(nodes):
        *_, x0 = reverse(x, i)
        x = x0 if i == nodes[-1] else dpm_update(x, x0, x0_prev, (log_snrs[k - 1], *log_snrs[k:k + 2]), *alpha_bars[k:k + 2])
        x0_prev = x0
        yield diffusion.timesteps[i], x, x0


def key_seed(key):
    """A seed for a key, a whole number >= 0 or a tuple of them: other keys have other, unrelated seeds."""
    entropy = (len(key), *key) if isinstance(key, tuple) else (1, key)       # without the length, zeros at its end would not count
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def keyed_generator(key, device="cpu"):
    """A random generator whose draws depend on a key alone, see `key_seed`."""
    return torch.Generator(device).manual_seed(key_seed(key))


def normal_noises(shape, noise, seeds, device):
    """Yield x_T, then the noise of one step after the other: given, or standard normal, of one generator on the CPU a seed."""
    if noise is not None and noise.ndim == len(shape) + 1:
        yield from noise
        raise ValueError(f"noise of {len(noise)} rows, where there are more steps")
    if noise is not None:
        yield noise
    generators = None if seeds is None else [keyed_generator(seed) for seed in seeds]
    while True:
        if generators is None:
            yield torch.randn(shape, device=device)
        else:
            yield torch.stack([torch.randn(shape[1:], generator=one) for one in generators]).to(device, non_blocking=True)


def unconditional_rows(model, y, y_null, cfg_scale):
    """y_null, by default model.null_label, for each row of y; None without guidance.  ValueError where guidance lacks one."""
    if cfg_scale == 1:
        return None
    y_null = getattr(model, "null_label", None) if y_null is None else y_null
    if y is None or y_null is None:
        raise ValueError(f"guidance scale {cfg_scale} needs a condition and a model with an unconditional input")
    return y_null.to(y).expand_as(y) if torch.is_tensor(y_null) else torch.full_like(y, y_null)


def begin(process, model, shape, y=None, cfg_scale=1.0, cfg_channels=None, cfg_interval=None, y_null=None, noise=None, seeds=None,
          clip=False, correct=None):
    """Where a sampler begins -> x_T, the noises of its steps, and the guided `reverse_process`.  The arguments are `sample`'s."""
    if seeds is not None and len(seeds) != shape[0]:
        raise ValueError(f"{len(seeds)} seeds for {shape[0]} images")
    if cfg_channels is not None and cfg_channels > shape[1]:
        raise ValueError(f"guidance on {cfg_channels} channels, where x has {shape[1]}")
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    device = next((z.device for z in (noise, y, *parameters) if z is not None), "cpu")
    noises = normal_noises(shape, noise, seeds, device)
    x = next(noises)                                                                     # x_T ~ N(0, I), Eq. 2-5
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"noise of shape {tuple(x.shape)} where x has {tuple(shape)}")
    rows, (low, high) = unconditional_rows(model, y, y_null, cfg_scale), cfg_interval or (-math.inf, math.inf)
    inside, outside = (reverse_process(process, guided(model, y, rows, s, cfg_channels), clip, correct) for s in (cfg_scale, 1))
    return x, noises, lambda x, i: (inside if low <= process.timesteps[i] <= high else outside)(x, i)


def check_sampler(sampler, steps, eta, T):
    """ValueError on a sampler that is none, an eta that it does not take, or steps that dpm++ cannot take out of T."""
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: one of {', '.join(SAMPLERS)}")
    if eta and sampler != "ddim":
        raise ValueError(f"eta is a setting of ddim, not of {sampler}")
    if sampler == "dpm++" and steps is not None and not (isinstance(steps, int) and 1 <= steps <= T):
        raise ValueError(f"cannot take {steps!r} steps out of {T}")


@torch.no_grad()
def sample(diffusion, model, shape, y=None, sampler="ddpm", steps=None, eta=0.0, cfg_scale=1.0, cfg_channels=None,
           cfg_interval=None, y_null=None, noise=None, seeds=None, clip=False, callback=None, correct=None):
    """Draw x0 of the given shape (N, C, H, W) by running the reverse process, Eq. 2-5 … 2-7, from x_T ~ N(0, I).

    y: labels (N,) or a context (N, M, D), on the model's device. steps: evaluations along the trajectory (guidance's pair
    counts once), all T by default, as in `Diffusion.respaced`; dpm++ takes a count only. eta: DDIM's noise. cfg_scale,
    cfg_channels: see `guided`; cfg_interval (low, high): guide between these times, as the model is told them, ends included.
    y_null, a label or a context (M, D), defaults to model.null_label. noise: x_T like x, or (1 + evaluations, N, C, H, W): x_T
    and the noise of each step. seeds: one for each image, see `key_seed`, which then comes out the same in whatever batch.
    clip clamps each predicted x0 to [-1, 1]: pixels, not latents; the function `correct` is then applied to it. callback(t, x, x0)
    sees each step. ValueError on guidance without an unconditional input, and on what else does not fit.
    """
    check_sampler(sampler, steps, eta, diffusion.T)
    process = diffusion if steps is None or sampler == "dpm++" else diffusion.respaced(steps)
    x, noises, reverse = begin(process, model, shape, y, cfg_scale, cfg_channels, cfg_interval, y_null, noise, seeds, clip, correct)
    if sampler == "ddpm":
        trajectory = ddpm_steps(process, reverse, x, noises)
    elif sampler == "ddim":
        trajectory = ddim_steps(process, reverse, x, noises, eta)
    else:
        trajectory = dpm_steps(process, reverse, x, dpm_nodes(process.T, steps or process.T))
    for step, x, x0 in trajectory:
        if callback is not None:
            callback(step, x, x0)
    return x


@torch.no_grad()
def ddim_invert(diffusion, model, x0, y=None, steps=None):
    """Run DDIM backwards from an image to the noise it came from: x0 (N, C, H, W) -> x_T.  Song et al. 2021, section 4.3.

    `sample(..., sampler="ddim", steps=steps, noise=x_T)` returns to x0, the nearer the more steps there are.
    """
    x, process = x0, diffusion if steps is None else diffusion.respaced(steps)
    for i in range(process.T):
        t = torch.full((len(x),), i, device=x.device)
        output = model(x, process.original(t), y)
        alpha_bar_next = process.alpha_bars[i + 1] if i + 1 < process.T else 0.0
        x0_pred, eps = process.predict(process.split(output, x)[0], x, t)
        x = alpha_bar_next ** 0.5 * x0_pred + (1 - alpha_bar_next) ** 0.5 * eps
    return x
