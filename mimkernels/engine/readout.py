"""Readouts of frozen features that several commands fit."""

from torch import Tensor


def logistic_accuracy(train: Tensor, train_targets: Tensor, test: Tensor, test_targets: Tensor) -> float:
    """scikit-learn's logistic regression on standardised features (C = 1)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(train.numpy(), train_targets.numpy())
    return float(model.score(test.numpy(), test_targets.numpy()))
