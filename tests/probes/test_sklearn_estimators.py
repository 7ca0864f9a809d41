"""Every estimator of scikit-learn: its graph gives its own scores in onnxruntime, or it is refused by name with what to do instead.

The table of ``docs/reference/estimators.md`` is what these tests find.
"""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from skl2onnx import update_registered_converter
from skl2onnx.common.data_types import FloatTensorType
from sklearn.base import BaseEstimator, ClassifierMixin, OutlierMixin, RegressorMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.decomposition import PCA, FactorAnalysis, FastICA, IncrementalPCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import (
    BaggingClassifier,
    BaggingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.feature_selection import RFE, SelectKBest, VarianceThreshold
from sklearn.frozen import FrozenEstimator
from sklearn.impute import SimpleImputer
from sklearn.kernel_approximation import Nystroem
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import (
    Lasso,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    Perceptron,
    Ridge,
    RidgeClassifier,
    SGDClassifier,
    TweedieRegressor,
)
from sklearn.model_selection import FixedThresholdClassifier, GridSearchCV, RandomizedSearchCV, TunedThresholdClassifierCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputRegressor
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    PolynomialFeatures,
    RobustScaler,
    StandardScaler,
)
from sklearn.random_projection import GaussianRandomProjection
from sklearn.svm import SVC, SVR, LinearSVC, NuSVC, OneClassSVM
from sklearn.utils import all_estimators

from probescore.types import ScoreUnit, Tap
from probescore_probes import sklearn_probe
from probescore_probes.exporting import ProbeFunction
from probescore_server.probes.format.graph import GraphSignature, check_graph, check_signature
from probescore_server.probes.stacking.graph_reader import read_network

WIDTH, ROWS = 6, 90
TAP = Tap("resid_post", 1)
DOCS = Path(__file__).parents[2] / "docs/reference/estimators.md"

_RANDOM = np.random.default_rng(0)
X = (_RANDOM.standard_normal((ROWS, WIDTH)) * [1, 3, 0.3, 1, 1, 2] + [0, 5, 0, 0, -2, 0]).astype(np.float32)
_NOISE = _RANDOM.standard_normal(ROWS)
Y = {
    "two": (X[:, 0] + 0.5 * _NOISE > 0).astype(int),
    "three": np.digitize(X[:, 3] + 0.5 * _NOISE, [-0.6, 0.6]),
    "value": np.exp(0.3 * X[:, 5] + 0.1 * _NOISE),
    "values": np.stack([X[:, 5] + 0.1 * _NOISE, X[:, 0] - X[:, 1]], axis=1),
    "outliers": None,
}

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(60)]


def fit(estimator: BaseEstimator, target: str, x: np.ndarray = X, dtype: type[np.floating] = np.float64) -> BaseEstimator:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return estimator.fit(x.astype(dtype), Y[target])


def model_of(probe: ProbeFunction, width: int = WIDTH) -> onnx.ModelProto:
    signature = GraphSignature((TAP,), width, probe.columns)
    model = probe.export(signature)
    model.ir_version = 10
    check_signature(model, signature, "estimator")
    check_graph(model, "estimator")
    return model


def check_equal(probe: ProbeFunction, model: onnx.ModelProto, expected, width: int = WIDTH) -> None:
    """In onnxruntime, on rows like those of the training, far smaller, and far larger."""
    random = np.random.default_rng(1)
    rows = np.concatenate([X[:, :width], *(scale * random.standard_normal((60, width)) for scale in (0.01, 1, 30))]).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {str(TAP): rows})
    scores = np.asarray(expected(rows.astype(np.float64)), np.float64).reshape(len(rows), -1)
    assert found.dtype == np.float32
    assert found.shape == scores.shape
    assert (np.abs(found - scores).max(axis=0) <= 1e-4 * scores.std(axis=0)).all()
    assert np.allclose(probe.score({str(TAP): rows}), scores, rtol=1e-12)


def own_scores(estimator, probe: ProbeFunction):
    """What the estimator itself says, in the probe's unit."""
    if probe.unit is ScoreUnit.PROBABILITY:
        return lambda rows: estimator.predict_proba(rows)[:, -probe.columns :]
    return estimator.decision_function if hasattr(estimator, "decision_function") else estimator.predict


def check_written(estimator, *, unit: ScoreUnit | None = None, linear: bool | None = None) -> ProbeFunction:
    probe = sklearn_probe(estimator)
    model = model_of(probe)
    check_equal(probe, model, own_scores(estimator, probe))
    if unit is not None:
        assert probe.unit is unit
    if linear is not None:
        assert ([node.op_type for node in model.graph.node] == ["Gemm"]) is linear
    return probe


# ----------------------------------------------------------------------------------------------------------- all that there are

MADE_OF = {
    "VotingClassifier": {"estimators": [("a", LogisticRegression()), ("b", GaussianNB())], "voting": "soft"},
    "StackingClassifier": {"estimators": [("a", LogisticRegression()), ("b", GaussianNB())]},
    "VotingRegressor": {"estimators": [("a", Ridge()), ("b", Ridge(2))]},
    "StackingRegressor": {"estimators": [("a", Ridge()), ("b", Ridge(2))]},
    "SelfTrainingClassifier": {"estimator": LogisticRegression()},
    "ClassifierChain": {"estimator": LogisticRegression()},
    "TransformedTargetRegressor": {"regressor": Ridge()},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "Lasso": {"alpha": 0.01},
    "ElasticNet": {"alpha": 0.01},
    "LassoLars": {"alpha": 0.001},
    "QuantileRegressor": {"alpha": 0.0},
    "OrthogonalMatchingPursuitCV": {"cv": 3},
    "CCA": {"n_components": 1},
    "PLSCanonical": {"n_components": 1},
    "LocalOutlierFactor": {"novelty": True},
    "RadiusNeighborsClassifier": {"radius": 100.0},
    "RadiusNeighborsRegressor": {"radius": 100.0},
}
MANY_TARGETS = (
    "CCA PLSCanonical MultiOutputRegressor RegressorChain MultiTaskElasticNet MultiTaskElasticNetCV MultiTaskLasso MultiTaskLassoCV"
)
TARGETS = dict.fromkeys(MANY_TARGETS.split(), "values")
COUNTS = ("MultinomialNB", "ComplementNB", "CategoricalNB")  # are fitted on numbers that are not negative
ONE_FEATURE = ("IsotonicRegression",)
TABLES_OF_LABELS = ("MultiOutputClassifier", "ClassifierChain")
TWO_CLASSES_ONLY = ("FixedThresholdClassifier", "TunedThresholdClassifierCV")


def made(name: str, kind: type[BaseEstimator]) -> BaseEstimator:
    said = dict(MADE_OF.get(name, {}) | SETTINGS.get(name, {}))
    parameters = inspect.signature(kind.__init__).parameters
    if parameters.get("estimator") is not None and parameters["estimator"].default is inspect.Parameter.empty:
        said.setdefault("estimator", LogisticRegression() if issubclass(kind, ClassifierMixin) or "Search" in name else Ridge())
    if "param_grid" in parameters or "param_distributions" in parameters:
        said |= {"param_grid" if "param_grid" in parameters else "param_distributions": {"C": [0.1, 1]}}
    if "n_iter" in parameters and "Search" in name:
        said["n_iter"] = 2
    few = {"random_state": 0, "n_estimators": 4, "n_jobs": None, "max_subpopulation": 50, "n_alphas": 5}
    if "Hist" in name:
        few["max_iter"] = 5
    if name.startswith("MLP"):
        few |= {"max_iter": 30, "hidden_layer_sizes": (5,)}
    return kind(**{key: value for key, value in few.items() if key in parameters and key not in said}, **said)


def cases() -> list[Any]:
    every = all_estimators()
    found = {}
    for name, kind in all_estimators("classifier"):
        for target in ("two",) if name in TWO_CLASSES_ONLY else ("two", "three"):
            found[name, target] = kind
    for name, kind in [*all_estimators("regressor"), *(entry for entry in every if entry[0] in ("CCA", "PLSCanonical"))]:
        found[name, TARGETS.get(name, "value")] = kind
    found |= {(name, "outliers"): kind for name, kind in every if issubclass(kind, OutlierMixin)}
    return [pytest.param(name, kind, target, id=f"{name}-{target}") for (name, target), kind in found.items()]


def outcome(name: str, kind: type[BaseEstimator], target: str, dtype: type[np.floating] = np.float64) -> str:
    """In the words of the documentation's table: its unit and whether it is one ``Gemm``, or that it is refused."""
    estimator = made(name, kind)
    if name in TABLES_OF_LABELS:
        estimator.fit(X, np.stack([Y["two"], Y["two"][::-1]], axis=1))
    elif name in COUNTS:
        fit(estimator, target, np.abs(X).round(), dtype)
    elif name in ONE_FEATURE:
        fit(estimator, target, X[:, :1], dtype)
    else:
        fit(estimator, target, dtype=dtype)
    try:
        probe = sklearn_probe(estimator)
    except ValueError as error:
        check_says_what_to_do(str(error), name)
        return "refused"
    width = 1 if name in ONE_FEATURE else WIDTH
    model = model_of(probe, width)
    check_equal(probe, model, own_scores(estimator, probe), width)
    operators = [node.op_type for node in model.graph.node]
    return f"{probe.unit.value}{', one `Gemm`' if operators == ['Gemm'] else ''}"


def check_says_what_to_do(message: str, name: str) -> None:
    assert message.startswith(f"estimator: {name}")
    assert re.search(r"; (fit|a |use|make|give)|can be written", message)
    assert not re.search(r"Error|Missing|Traceback|pydantic|onnx\.ai|\n", message)


@pytest.mark.parametrize(("name", "kind", "target"), cases())
def test_an_estimator_is_written_right_or_refused_by_name(name, kind, target):
    assert outcome(name, kind, target) == documented()[name][target]


@pytest.mark.parametrize(("name", "kind", "target"), cases())
def test_an_estimator_fitted_on_float32_rows_as_activations_are_is_written_alike(name, kind, target):
    assert outcome(name, kind, target, np.float32) == documented()[name][target]


def documented() -> dict[str, dict[str, str]]:
    """By estimator and what it was fitted for: what the table in the documentation says."""
    said: dict[str, dict[str, str]] = {}
    for line in DOCS.read_text().splitlines():
        if line.startswith("| `"):
            names, two, three, other = (cell.strip() for cell in line.strip("|").split("|"))
            for name in re.findall(r"`(\w+)`", names):
                said[name] = {"two": two, "three": three, "value": other, "values": other, "outliers": other}
    return said


# ------------------------------------------------------------------------------------------------------- pipelines and what holds others

LOGIT, PROBABILITY, VALUE = ScoreUnit.LOGIT, ScoreUnit.PROBABILITY, ScoreUnit.VALUE
WRITTEN: dict[str, tuple[BaseEstimator, str, ScoreUnit, bool]] = {
    **{
        f"{type(scaler).__name__} before logistic regression": (make_pipeline(scaler, LogisticRegression()), "two", LOGIT, True)
        for scaler in (StandardScaler(), StandardScaler(with_mean=False), MinMaxScaler(), MaxAbsScaler(), RobustScaler())
    },
    **{
        f"{type(step).__name__} before support vectors": (make_pipeline(StandardScaler(), step, LinearSVC()), "two", VALUE, True)
        for step in (
            PCA(3, whiten=True),
            IncrementalPCA(3),
            TruncatedSVD(3),
            FastICA(3),
            FactorAnalysis(3),
            GaussianRandomProjection(3),
            SelectKBest(k=3),
            VarianceThreshold(),
            RFE(LinearSVC(), n_features_to_select=3),
            SimpleImputer(),
            FunctionTransformer(),
        )
    },
    "two scalers before a perceptron of three classes": (
        make_pipeline(StandardScaler(), MinMaxScaler(), Perceptron()),
        "three",
        VALUE,
        True,
    ),
    "nothing before a perceptron": (make_pipeline("passthrough", Perceptron()), "two", VALUE, True),
    "a pipeline in a pipeline": (make_pipeline(make_pipeline(StandardScaler(), PCA(3)), Ridge()), "value", VALUE, True),
    "a union of steps": (make_pipeline(FeatureUnion([("a", PCA(2)), ("b", StandardScaler())]), Ridge()), "value", VALUE, True),
    "steps for columns": (
        make_pipeline(ColumnTransformer([("a", StandardScaler(), [0, 1]), ("b", "passthrough", [3, 5]), ("c", "drop", [2])]), Ridge()),
        "value",
        VALUE,
        True,
    ),
    "components before logistic regression": (make_pipeline(PCA(3), LogisticRegression()), "two", PROBABILITY, False),
    "components before logistic regression of three": (
        make_pipeline(StandardScaler(), PCA(3), LogisticRegression()),
        "three",
        PROBABILITY,
        False,
    ),
    "discriminants as components": (make_pipeline(LinearDiscriminantAnalysis(), RidgeClassifier()), "three", VALUE, True),
    "stochastic logistic regression": (make_pipeline(StandardScaler(), SGDClassifier(loss="log_loss", random_state=0)), "two", LOGIT, True),
    "stochastic logistic regression of three": (
        make_pipeline(StandardScaler(), SGDClassifier(loss="log_loss", random_state=0)),
        "three",
        PROBABILITY,
        False,
    ),
    "a loss whose probability is no sigmoid": (
        make_pipeline(StandardScaler(), SGDClassifier(loss="modified_huber", random_state=0)),
        "two",
        VALUE,
        True,
    ),
    "a linear kernel": (make_pipeline(StandardScaler(), SVC(kernel="linear")), "two", VALUE, True),
    "a linear kernel, nu": (make_pipeline(StandardScaler(), NuSVC(kernel="linear")), "two", VALUE, True),
    "a linear kernel, regression": (SVR(kernel="linear"), "value", VALUE, True),
    "a linear kernel, outliers": (OneClassSVM(kernel="linear"), "outliers", VALUE, True),
    "a radial kernel on components": (make_pipeline(StandardScaler(), PCA(3), SVC()), "two", VALUE, False),
    "a radial kernel on scaled rows": (make_pipeline(RobustScaler(), SVC(gamma=0.1)), "two", VALUE, False),
    "a polynomial kernel": (make_pipeline(MaxAbsScaler(), SVC(kernel="poly", coef0=1.0)), "two", VALUE, False),
    "a sigmoid kernel": (make_pipeline(StandardScaler(), SVC(kernel="sigmoid", gamma=0.1)), "two", VALUE, False),
    "a radial kernel, ridge": (KernelRidge(kernel="rbf", gamma=0.1), "value", VALUE, False),
    "a polynomial kernel, ridge of two": (
        make_pipeline(StandardScaler(), KernelRidge(kernel="polynomial", degree=2)),
        "values",
        VALUE,
        False,
    ),
    "support vectors, one against the rest": (OneVsRestClassifier(SVC()), "three", VALUE, False),
    "linear support vectors, one against the rest": (OneVsRestClassifier(LinearSVC()), "three", VALUE, True),
    "forests, one against the rest": (OneVsRestClassifier(RandomForestClassifier(3, random_state=0)), "three", PROBABILITY, False),
    "a forest, one against the other": (OneVsRestClassifier(RandomForestClassifier(3, random_state=0)), "two", PROBABILITY, False),
    "pipelines, one against the rest": (
        OneVsRestClassifier(make_pipeline(StandardScaler(), LogisticRegression())),
        "three",
        PROBABILITY,
        False,
    ),
    **{
        f"{method} calibration of {name} for {target} classes": (
            CalibratedClassifierCV(inner, method=method, cv=2, ensemble=ensemble),
            target,
            PROBABILITY,
            False,
        )
        for method in ("sigmoid", "isotonic")
        for target, ensemble in (("two", True), ("two", False), ("three", True))
        for name, inner in (
            ("a pipeline", make_pipeline(StandardScaler(), LogisticRegression())),
            ("support vectors", make_pipeline(StandardScaler(), LinearSVC())),
            ("a forest", RandomForestClassifier(3, max_depth=3, random_state=0)),
        )
    },
    "calibration of a radial kernel": (CalibratedClassifierCV(make_pipeline(StandardScaler(), SVC()), cv=2), "two", PROBABILITY, False),
    "calibration by a temperature": (CalibratedClassifierCV(LogisticRegression(), method="temperature", cv=2), "two", PROBABILITY, False),
    "a calibrated model behind a scaler": (
        make_pipeline(StandardScaler(), CalibratedClassifierCV(LinearSVC(), cv=2)),
        "two",
        PROBABILITY,
        False,
    ),
    "calibration of a fitted model": (
        CalibratedClassifierCV(FrozenEstimator(LogisticRegression().fit(X, Y["two"]))),
        "two",
        PROBABILITY,
        False,
    ),
    "a search": (
        GridSearchCV(make_pipeline(StandardScaler(), LogisticRegression()), {"logisticregression__C": [0.1, 1]}),
        "two",
        LOGIT,
        True,
    ),
    "a random search for ridge regression": (RandomizedSearchCV(Ridge(), {"alpha": [0.1, 1]}, n_iter=2), "value", VALUE, True),
    "a search in a pipeline": (make_pipeline(StandardScaler(), GridSearchCV(LinearSVC(), {"C": [0.1, 1]})), "two", VALUE, True),
    "another threshold": (
        FixedThresholdClassifier(make_pipeline(StandardScaler(), LogisticRegression()), threshold=0.9),
        "two",
        LOGIT,
        True,
    ),
    "a tuned threshold of a forest": (
        TunedThresholdClassifierCV(RandomForestClassifier(3, random_state=0), cv=2),
        "two",
        PROBABILITY,
        False,
    ),
    "a vote with weights": (
        VotingClassifier(
            [("a", make_pipeline(StandardScaler(), LogisticRegression())), ("b", RandomForestClassifier(3, random_state=0))],
            voting="soft",
            weights=[1, 3],
        ),
        "two",
        PROBABILITY,
        False,
    ),
    "a vote of three classes": (
        VotingClassifier([("a", GaussianNB()), ("b", LogisticRegression())], voting="soft"),
        "three",
        PROBABILITY,
        False,
    ),
    "a mean of regressions": (
        VotingRegressor([("a", Ridge()), ("b", make_pipeline(StandardScaler(), LinearRegression()))], weights=[1, 3]),
        "value",
        VALUE,
        True,
    ),
    "bags of ridge regressions of some columns": (BaggingRegressor(Ridge(), 3, max_features=0.5, random_state=0), "value", VALUE, True),
    "bags of logistic regressions": (BaggingClassifier(LogisticRegression(), 3, random_state=0), "two", PROBABILITY, False),
    "a scaled target": (TransformedTargetRegressor(Ridge(), transformer=StandardScaler()), "value", VALUE, True),
    "several targets": (MultiOutputRegressor(make_pipeline(StandardScaler(), Ridge())), "values", VALUE, True),
    "boosted trees behind components": (make_pipeline(PCA(3), HistGradientBoostingClassifier(max_iter=5)), "two", PROBABILITY, False),
    "boosted counts": (HistGradientBoostingRegressor(loss="poisson", max_iter=5), "value", VALUE, False),
    "a network behind a scaler": (
        make_pipeline(StandardScaler(), MLPClassifier((5,), max_iter=30, random_state=0)),
        "two",
        PROBABILITY,
        False,
    ),
    "an identity link": (TweedieRegressor(power=0, alpha=0.1), "value", VALUE, True),
    "features that are not linear": (make_pipeline(Normalizer(), LogisticRegression()), "two", PROBABILITY, False),
    "rows of one length before support vectors": (make_pipeline(Normalizer(), LinearSVC()), "three", VALUE, False),
    "rows of one length before discriminants": (
        make_pipeline(StandardScaler(), Normalizer(), LinearDiscriminantAnalysis()),
        "two",
        PROBABILITY,
        False,
    ),
    "rows of one length before a kernel": (make_pipeline(Normalizer(), StandardScaler(), SVC()), "two", VALUE, False),
    "products of features": (make_pipeline(StandardScaler(), PolynomialFeatures(2), Ridge()), "value", VALUE, False),
    "calibration behind rows of one length": (
        CalibratedClassifierCV(make_pipeline(Normalizer(), LinearSVC()), cv=2),
        "two",
        PROBABILITY,
        False,
    ),
    "a mixture behind a scaler": (make_pipeline(StandardScaler(), GaussianNB()), "two", PROBABILITY, False),
    "a mixture among others": (
        VotingClassifier([("a", LogisticRegression()), ("b", GaussianNB())], voting="soft", weights=[1, 3]),
        "three",
        PROBABILITY,
        False,
    ),
    "a cross-validated strength": (make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=2)), "two", LOGIT, True),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", WRITTEN)
def test_what_holds_other_estimators_is_written_right(kind, dtype):
    estimator, target, unit, linear = WRITTEN[kind]

    check_written(fit(estimator, target, dtype=dtype), unit=unit, linear=linear)


REFUSED: dict[str, tuple[BaseEstimator, str]] = {
    "support vectors of three classes behind rows of one length": (
        make_pipeline(Normalizer(), SVC(decision_function_shape="ovo")),
        "fit a OneVsRestClassifier",
    ),
    "a vote by counting": (VotingClassifier([("a", LogisticRegression()), ("b", GaussianNB())]), r"voting='soft'"),
    "support vectors of three classes": (make_pipeline(StandardScaler(), SVC()), "fit a OneVsRestClassifier"),
    "a kernel of the author's": (SVC(kernel=lambda a, b: a @ b.T), "its kernel is <lambda>; fit one with kernel linear"),
    "an approximation of a kernel that nothing converts": (make_pipeline(Nystroem(n_components=4), LinearSVC()), "onnx_probe"),
    "components alone": (PCA(2), "is no classifier, regressor or outlier detector"),
    "clusters": (KMeans(2), "is no classifier, regressor or outlier detector"),
    "a function of the author's": (make_pipeline(FunctionTransformer(np.square), LogisticRegression()), "onnx_probe"),
    "a temperature for three classes": (CalibratedClassifierCV(LogisticRegression(), method="temperature", cv=2), "use method='sigmoid'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_graph_is_refused_by_name_with_what_to_do(kind):
    estimator, reason = REFUSED[kind]
    target = "three" if "three" in kind else "two"
    with pytest.raises(ValueError, match=reason) as refused:
        sklearn_probe(fit(estimator, target))
    check_says_what_to_do(str(refused.value), type(estimator).__name__)


class Largest(RegressorMixin, BaseEstimator):
    """An author's own, with a converter of the author's own that takes the smallest."""

    def fit(self, x, y):
        self.n_features_in_ = x.shape[1]
        return self

    def predict(self, x):
        return x.max(axis=1)


def test_an_estimator_that_is_converted_wrong_is_refused():
    def shapes(operator):
        operator.outputs[0].type = FloatTensorType([None, 1])

    def convert(scope, operator, container):
        container.add_node("ReduceMin", operator.inputs[0].full_name, operator.outputs[0].full_name, op_version=13, axes=[1], keepdims=1)

    update_registered_converter(Largest, "Largest", shapes, convert)

    with pytest.raises(ValueError, match=r"^estimator: Largest cannot be written: the graph that skl2onnx makes of it is ") as refused:
        sklearn_probe(fit(Largest(), "value"))
    assert re.search(r"is [\d.]+ standard deviations off on random rows; ", str(refused.value))
    check_says_what_to_do(str(refused.value), "Largest")


class Prejudiced(GaussianNB):
    """Scores in its own way, by a method that its class keeps to itself."""

    def _joint_log_likelihood(self, X):  # noqa: N803  as its class has it
        return super()._joint_log_likelihood(X) * [0.5, 1]


def test_a_graph_that_differs_is_said_to_be_of_whoever_made_it():
    with pytest.raises(ValueError, match=r"^estimator: Prejudiced cannot be written: the graph that probescore makes of it is") as refused:
        sklearn_probe(fit(Prejudiced(), "two"))
    check_says_what_to_do(str(refused.value), "Prejudiced")


class Unusual(LogisticRegression):
    def decision_function(self, x):
        return np.tanh(super().decision_function(x))


NOT_FITTED_RIGHT = {
    "not fitted": (lambda: LogisticRegression(), "LogisticRegression is not fitted; call fit"),
    "a pipeline that is not fitted": (lambda: make_pipeline(StandardScaler(), SVC()), r"Pipeline\(StandardScaler, SVC\) is not fitted"),
    "one class only": (lambda: RandomForestClassifier(2).fit(X, np.zeros(ROWS)), r"was fitted on one class only \(0.0\)"),
    "several outputs": (lambda: RandomForestClassifier(2).fit(X, np.stack([Y["two"], Y["three"]], 1)), "several labels for each row"),
    "several labels": (
        lambda: MLPClassifier((3,), max_iter=5).fit(X, np.stack([Y["two"], 1 - Y["two"][::-1]], 1)),
        "several labels for each row",
    ),
    "weights of 0": (lambda: fit(Lasso(alpha=100.0), "value"), "all of its weights are 0"),
    "a search that kept nothing": (
        lambda: fit(GridSearchCV(LogisticRegression(), {"C": [1]}, refit=False), "two"),
        "refit=False and keeps no estimator; fit it with refit=True",
    ),
    "a subclass that computes something else": (lambda: fit(Unusual(), "two"), "cannot be written"),
}


@pytest.mark.parametrize("kind", NOT_FITTED_RIGHT)
def test_what_was_not_fitted_for_a_probe_is_refused_by_name(kind):
    make, reason = NOT_FITTED_RIGHT[kind]
    with pytest.raises(ValueError, match=reason) as refused:
        sklearn_probe(make())
    assert str(refused.value).startswith("estimator: ")


@pytest.mark.parametrize("given", [LogisticRegression, None, "a.joblib", {"coef": [1]}, np.ones(3), lambda x: x])
def test_what_is_no_estimator_is_refused(given):
    with pytest.raises(TypeError, match=r"^estimator: "):
        sklearn_probe(given)


# -------------------------------------------------------------------------------------------------------------------- names and numbers


@pytest.mark.parametrize("classes", [(0, 1), (-1, 1), (False, True), ("honest", "lying"), (3, 7), (0.0, 1.0)])
def test_of_two_classes_whatever_they_are_called_the_second_is_scored(classes):
    target = np.array(classes)[Y["two"]]
    estimator = LogisticRegression().fit(X, target)

    probe = check_written(estimator, unit=LOGIT, linear=True)

    assert (probe.columns, probe.classes) == (1, tuple(map(str, estimator.classes_)))


class Renamed(LogisticRegression):
    """As labs have them: another name, the same scores."""


def test_a_subclass_that_scores_as_its_class_does_is_written_as_it():
    check_written(make_pipeline(StandardScaler(), Renamed()).fit(X, Y["two"]), unit=LOGIT, linear=True)


def test_columns_are_in_the_order_of_the_classes():
    estimator = RandomForestClassifier(3, random_state=0).fit(X, np.array(["low", "middle", "high"])[Y["three"]])

    assert check_written(estimator).classes == ("high", "low", "middle")


def test_weights_are_folded_in_float64():
    """A mean of 1e4 beside a spread of 1e-2 would cost float32 all of its digits on the way."""
    rows = np.random.default_rng(3).standard_normal((ROWS, WIDTH)) * 1e-2 + 1e4
    estimator = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, Y["two"])

    weight, bias = (onnx.numpy_helper.to_array(tensor) for tensor in model_of(sklearn_probe(estimator)).graph.initializer)

    exact = estimator[-1].coef_ / estimator[0].scale_
    assert np.allclose(weight, exact, rtol=2e-7)
    assert np.allclose(bias, estimator[-1].intercept_ - exact @ estimator[0].mean_, rtol=2e-7)


@pytest.mark.parametrize("kind", ["components before logistic regression", "a search", "another threshold", "a network behind a scaler"])
def test_what_is_linear_or_a_network_can_be_stacked_with_other_probes(kind):
    estimator, target, _, _ = WRITTEN[kind]
    probe = sklearn_probe(fit(estimator, target))

    assert read_network(model_of(probe), GraphSignature((TAP,), WIDTH, probe.columns)) is not None


def test_an_estimator_fitted_on_named_columns_takes_them_in_order_without_warnings():
    estimator = LogisticRegression().fit(X, Y["two"])
    expected = estimator.decision_function(X)
    estimator.feature_names_in_ = np.array([f"unit {i}" for i in range(WIDTH)], object)  # as a fit on a table of named columns leaves them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe = sklearn_probe(estimator)
        scores = probe.score({str(TAP): X})

    assert np.array_equal(scores[:, 0], LogisticRegression.decision_function(estimator, X.astype(np.float64)))
    assert np.allclose(scores[:, 0], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_estimator_fitted_in_any_precision_is_written(dtype):
    check_written(LogisticRegression().fit(X.astype(dtype), Y["two"]), unit=LOGIT, linear=True)


def test_every_estimator_of_scikit_learn_is_in_the_documentation():
    known = {case.values[0] for case in cases()}

    assert set(documented()) == known
