"""The retrieval task, for images and video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from lavis.tasks.retrieval import RetrievalTask

from lavis_uniadapter.datasets.loading import SamplesView
from lavis_uniadapter.datasets.reading import Unreadable
from lavis_uniadapter.evaluation.ranking_metrics import (
    RANKS,
    metric_names,
    retrieval_metrics,
    retrieval_outcomes,
    retrieval_ranks,
)
from lavis_uniadapter.evaluation.two_stage import score_gallery
from lavis_uniadapter.models.lavis_models import is_lavis_model, lavis_similarities
from lavis_uniadapter.tasks.prediction import MeasuredTask, visual_kind


@registry.register_task("uniadapter_retrieval")
class UniAdapterRetrievalTask(MeasuredTask, RetrievalTask):
    """Text-visual retrieval: R@1, R@5, R@10, median and mean rank, in both directions.

    Metrics are named ``t2v_r1``, ``v2t_medr`` and so on for video, ``t2i_…`` and ``i2t_…`` for
    images. ``run.selection_metric`` is any of these, or ``mean_recall``, the mean of the six
    recalls.
    """

    METHOD, MODEL = "compute_sim_matrix", "blip_uniadapter_retrieval"
    NAME, LOWER_IS_BETTER = "uniadapter_retrieval", RANKS

    def build_datasets(self, cfg):
        """LAVIS's datasets; ConfigError if they do not have the selection metric."""
        datasets = super().build_datasets(cfg)
        first = next(iter(next(iter(datasets.values())).values()))
        self.check_selection_metric(metric_names(visual_kind(first)))
        return datasets

    def evaluation(self, model, data_loader, **kwargs):
        """Metrics, outcomes and unreadable items of a split (main process; None on the others)."""
        if is_lavis_model(type(model)):
            scores = lavis_similarities(model, SamplesView(data_loader), self.cfg)
            unreadable: Mapping[int, Unreadable] = {}
        else:
            *scores, unreadable = score_gallery(model, data_loader, self.settings)
        if not is_main_process():
            return None
        data = data_loader.dataset
        ranks = retrieval_ranks(*scores, data.txt2img, data.img2txt, visual_kind(data))
        faults = [asdict(fault) for _, fault in sorted(unreadable.items())]
        return retrieval_metrics(ranks), retrieval_outcomes(ranks), faults

    def after_evaluation(self, val_result, split_name, epoch, **kwargs):
        """Write metrics and outcomes to the run's ``result`` folder; returns the metrics."""
        return self.write(split_name, epoch, *val_result)
