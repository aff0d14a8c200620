"""From features to scores: Fréchet distance, Inception score, precision and recall; nearest neighbours, and PSNR.

Report §4-6 and Fig. 5-2. Heusel et al. 2017 (the Fréchet distance), Salimans et al. 2016 (the Inception score), Kynkäänniemi
et al. 2019 (precision and recall). Nothing here knows an image or a network: features are rows (n, D), of any space. The
Fréchet distance of Inception's pooled features is FID, of its spatial ones sFID. Statistics are float64 on the features' device;
where papers differ in a detail, this follows ADM's evaluator (Dhariwal & Nichol 2021), whose numbers are those in print.
"""
import math

import torch

BLOCK = 2 ** 25                        # distances held at once: 128 MB in float32
SLACK = 0.01                           # of the largest variance: a careless sum in float32 is off by a thousandth of it
ROUNDING = 2e-6                        # of a squared distance in float32, relative to the squared norms: so near is inside a radius


def finite_rows(features, name="features"):
    """Features as a finite tensor (n, D) of at least two rows.  ValueError otherwise."""
    features = torch.as_tensor(features)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{name} of shape {tuple(features.shape)}: at least two samples are needed")
    bad = (~features.isfinite()).any(dim=1).sum().item()
    if bad:
        raise ValueError(f"{name}: {bad} of {len(features)} rows are NaN or infinite")
    return features


class Statistics:
    """Mean and covariance of rows that come in batches, in one pass: Chan, Golub & LeVeque 1979.

    The scatter sum (x - mean)(x - mean)^T is kept around the mean so far, never as a sum of squares, so that a mean of 1e4 beside
    a variance of 1e-4 costs no digit. .n; .mu (D,) and .sigma (D, D), the covariance with n - 1 as numpy.cov's, float64.
    """

    def __init__(self, n=0, mu=0.0, scatter=0.0):
        self.n, self.mu, self.scatter = n, mu, scatter

    def add(self, features):
        """Add rows (n, D)."""
        features = features.double()
        mu = features.mean(dim=0)                                        # (D,)
        centred = features - mu
        return self.merge(Statistics(len(features), mu, centred.T @ centred))

    def merge(self, other):
        """Add another's rows."""
        if other.n == 0:
            return self
        if self.n == 0:
            self.scatter = torch.zeros_like(other.scatter)
        n, apart = self.n + other.n, other.mu - self.mu
        self.mu = self.mu + apart * (other.n / n)
        self.scatter += other.scatter                                    # in place: of Inception it is 32 MiB
        self.scatter += torch.outer(apart, apart) * (self.n * other.n / n)
        self.n = n
        return self

    @property
    def sigma(self):
        if self.n < 2:
            raise ValueError(f"{self.n} samples: a covariance needs at least two")
        return self.scatter / (self.n - 1)


def check_covariance(sigma, name):
    """ValueError if sigma (D, D), finite, is no covariance: not symmetric, or of negative variance in some direction, both by more
    than rounding: SLACK of the largest variance."""
    if not sigma.any():                                  # features that never vary
        return
    largest = sigma.diagonal().max()
    sigma = sigma / largest                              # so that no scale is too small
    if (sigma - sigma.T).abs().max() > SLACK:
        raise ValueError(f"{name} is no covariance: it is not symmetric")
    slack = SLACK * torch.eye(len(sigma), dtype=sigma.dtype, device=sigma.device)
    if largest <= 0 or torch.linalg.cholesky_ex(sigma + slack).info:
        raise ValueError(f"{name} is no covariance: in some direction its variance is negative")


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), squared and not rooted as is usual.  Heusel et al. 2017.

    mu (D,), sigma (D, D). With sigma1 = A A^T, sigma1 sigma2 has the eigenvalues of the symmetric A^T sigma2 A, so that two
    symmetric eigenproblems give the trace of the root: it is real, and exact for singular matrices (fewer samples than
    features). ValueError on shapes that do not fit, numbers that are not finite, or a sigma that is no covariance.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(value).double() for value in (mu1, sigma1, mu2, sigma2))
    D = mu1.numel()
    if mu1.shape != (D,) or mu2.shape != (D,) or sigma1.shape != (D, D) or sigma2.shape != (D, D):
        raise ValueError(f"statistics of {tuple(mu1.shape)}, {tuple(sigma1.shape)} and {tuple(mu2.shape)}, {tuple(sigma2.shape)}: "
                         "both must be a mean (D,) and a covariance (D, D) of one feature space")
    if not all(value.isfinite().all() for value in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the statistics hold numbers that are NaN or infinite")
    for sigma, which in ((sigma1, "first"), (sigma2, "second")):
        check_covariance(sigma, f"the {which} statistics' sigma")
    values, vectors = torch.linalg.eigh(sigma1)
    kept = values > D * torch.finfo(torch.float64).eps * values[-1]      # the rest is rounding, whose root would not be small
    A = vectors[:, kept] * values[kept].sqrt()                           # (D, rank)
    root = torch.linalg.eigvalsh(A.T @ sigma2 @ A).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root).item()


def distance(a, b):
    """The Fréchet distance of two Statistics: far too large where a side has no more samples than features."""
    return frechet_distance(a.mu, a.sigma, b.mu, b.sigma)


def inception_score(probabilities, split=5000):
    """exp of the mean KL(p(y|x) || p(y)), between 1 and the number of classes.  Salimans et al. 2016; ADM's chunks.

    probabilities (n, K), rows that sum to 1. Each `split` rows in turn have their own p(y); the mean of their scores, the last
    and perhaps shorter one's included, is returned.
    """
    probabilities = finite_rows(probabilities, "probabilities").double()
    scores = []
    for p in probabilities.split(split):                                 # (n', K)
        divergence = torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(dim=0))
        scores.append(divergence.sum(dim=1).mean().exp())
    return torch.stack(scores).mean().item()


def squared_distances(rows, features, norms):
    """|a - b|^2 (n, M) of rows (n, D) and features (M, D), whose squared norms (M,) are given; rounded, so perhaps below 0."""
    return torch.addmm(norms, rows, features.T, alpha=-2).add_(rows.square().sum(dim=1, keepdim=True))


def squared_radii(features, k):
    """The squared distance (M,) of each row to the k-th nearest other one, block by block."""
    norms = features.square().sum(dim=1)
    radii = [squared_distances(rows, features, norms).topk(k + 1, largest=False).values[:, k]       # the nearest is itself
             for rows in features.split(max(1, BLOCK // len(features)))]
    return torch.cat(radii).clamp(min=0)


def precision_recall(real, fake, k=3):
    """Precision, the share of fakes within the manifold of the real, and recall, the converse.

    Kynkäänniemi et al. 2019, Eq. 1, 2. real (M, D), fake (n, D). A set's manifold is the union of balls around its rows, each out
    to its k-th nearest neighbour in the set. All pairs are looked at, in blocks of fixed memory. ValueError if a set has no k-th
    neighbour.
    """
    real, fake = finite_rows(real, "real features"), finite_rows(fake, "features of the samples")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"features of {real.shape[1]} and of {fake.shape[1]} numbers are not of one space")
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than {k} samples on both sides, not {len(real)} and {len(fake)}")
    centre = real.mean(dim=0)
    real, fake = real - centre, fake - centre                            # smaller norms round less
    norms = real.square().sum(dim=1)
    reach_of_real, reach_of_fake = squared_radii(real, k), squared_radii(fake, k)        # (M,), (n,)
    reach_of_real += ROUNDING * (norms + reach_of_real)
    reach_of_fake += ROUNDING * (fake.square().sum(dim=1) + reach_of_fake)
    realistic, covered = torch.zeros_like(reach_of_fake[0], dtype=torch.long), torch.zeros_like(reach_of_real, dtype=torch.bool)
    block = max(1, BLOCK // len(real))
    for rows, reach in zip(fake.split(block), reach_of_fake.split(block)):
        apart = squared_distances(rows, real, norms)                     # (n', M)
        realistic += (apart <= reach_of_real).any(dim=1).sum()
        covered |= (apart <= reach.unsqueeze(1)).any(dim=0)
    return realistic.item() / len(fake), covered.double().mean().item()


def nearest(queries, reference, k=3):
    """Indices (n, k) of the nearest reference images by pixel distance, for n queries of the same shape."""
    queries, reference = (torch.as_tensor(images).float().flatten(1) for images in (queries, reference))
    return torch.cat([torch.cdist(part, reference).topk(k, largest=False).indices for part in queries.split(512)])


def vote(labels, neighbours):
    """The majority label of each row's neighbours; the nearest one's where all differ.  labels (M,), neighbours (n, 3)."""
    first, second, third = labels[neighbours].unbind(dim=1)
    return torch.where(second == third, second, first)


def unique_share(neighbours):
    """The share of samples whose nearest image, neighbours (n,), is no other sample's nearest."""
    counts = neighbours.unique(return_counts=True)[1]
    return (counts == 1).sum().item() / len(neighbours)


def authentic_share(samples, real, neighbours):
    """The share of samples that are farther from the nearest real image, neighbours (n,), than it is from its own nearest one, by
    pixel distance. Alaa et al. 2022, section 3.2. A model that copies its data has 0."""
    samples, real = (torch.as_tensor(images).float().flatten(1) for images in (samples, real))
    places, rows = neighbours.unique(return_inverse=True)
    two = torch.cat([torch.cdist(part, real).topk(2, largest=False).values for part in real[places].split(512)])     # itself first
    return ((samples - real[neighbours]).norm(dim=1) > two[rows, 1]).double().mean().item()


def psnr(x, real):
    """The peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return 10 * math.log10(4 / (x - real).square().mean().item())
