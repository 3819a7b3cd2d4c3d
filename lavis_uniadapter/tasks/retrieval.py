"""The retrieval task, for images and video."""

from __future__ import annotations

from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from lavis.tasks.retrieval import RetrievalTask

from lavis_uniadapter.common.errors import ConfigError, nearest
from lavis_uniadapter.common.schema import Evaluation
from lavis_uniadapter.datasets.reading import gather_unreadable
from lavis_uniadapter.evaluation.ranking_metrics import (
    retrieval_metrics,
    retrieval_outcomes,
    retrieval_ranks,
)
from lavis_uniadapter.models.lavis_models import is_lavis_model, lavis_similarities
from lavis_uniadapter.runners import stock_runners
from lavis_uniadapter.tasks.prediction import UNREADABLE, write_metrics, write_outcomes


@registry.register_task("uniadapter_retrieval")
class UniAdapterRetrievalTask(RetrievalTask):
    """Text-visual retrieval: R@1, R@5, R@10, median and mean rank, both ways.

    Metrics are called ``t2v_r1``, ``v2t_medr`` and so on for video, ``t2i_…`` and ``i2t_…`` for
    images. ``run.selection_metric`` names the one that picks the best epoch: any of these, or
    ``mean_recall``, the mean of the six recalls.
    """

    LOWER_IS_BETTER = ("medr", "meanr")

    @classmethod
    def setup_task(cls, cfg):
        run = cfg.run_cfg
        stock_runners.check(run)
        task = cls(cfg=run)
        task.selection_metric = Evaluation.for_task("uniadapter_retrieval", run).selection_metric
        return task

    def build_datasets(self, cfg):
        """LAVIS's datasets.

        Raises:
            ConfigError: if the selection metric is none of what will be measured on them.
        """
        datasets = super().build_datasets(cfg)
        visual = visual_kind(next(iter(next(iter(datasets.values())).values())))
        self.check_selection_metric(visual)
        return datasets

    def check_selection_metric(self, visual: str) -> None:
        known = ["mean_recall", *_metric_names(visual)]
        if self.selection_metric not in known:
            raise ConfigError(
                f"run.selection_metric is '{self.selection_metric}'."
                f"{nearest(self.selection_metric, known)} Known: {', '.join(known)}."
            )

    def evaluation(self, model, data_loader, **kwargs):
        """Metrics and outcomes of a split, on the main process; None on the others."""
        if is_lavis_model(type(model)):
            scores_v2t, scores_t2v = lavis_similarities(model, data_loader, self.cfg)
        else:
            scores_v2t, scores_t2v = model.compute_sim_matrix(data_loader, task_cfg=self.cfg)
        unreadable = gather_unreadable(data_loader)
        if not is_main_process():
            return None
        dataset = data_loader.dataset
        ranks = retrieval_ranks(
            scores_v2t, scores_t2v, dataset.txt2img, dataset.img2txt, visual_kind(dataset)
        )
        metrics = retrieval_metrics(ranks)
        if unreadable:
            metrics[UNREADABLE] = len(unreadable)
        selected = metrics[self.selection_metric]
        # LAVIS's runners keep the epoch with the highest agg_metrics above 0.
        lower_is_better = self.selection_metric.endswith(self.LOWER_IS_BETTER)
        metrics["agg_metrics"] = 1 / selected if lower_is_better else selected
        return metrics, retrieval_outcomes(ranks)

    def after_evaluation(self, val_result, split_name, epoch, **kwargs):
        """Write metrics and outcomes to the run's ``result`` folder; returns the metrics."""
        if val_result is None:
            return None
        metrics, outcomes = val_result
        write_metrics(metrics, split_name, epoch)
        write_outcomes(outcomes, split_name)
        return metrics


def _metric_names(visual: str) -> list[str]:
    v = visual[0]
    return [
        f"{direction}_{name}"
        for direction in (f"t2{v}", f"{v}2t")
        for name in ("r1", "r5", "r10", "medr", "meanr")
    ]


def visual_kind(dataset) -> str:
    """``video`` or ``image``: what a LAVIS retrieval dataset shows, by its annotation."""
    return "video" if "video" in dataset.annotation[0] else "image"
