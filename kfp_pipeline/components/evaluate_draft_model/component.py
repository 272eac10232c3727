"""Evaluation: how many tokens the draft saves, and that it changes none."""

from kfp import dsl
from kfp.dsl import HTML, Markdown, Metrics, Output

from kfp_pipeline.components.images import IMAGES


@dsl.component(base_image=IMAGES["trainer"], install_kfp_package=False)
def evaluate_draft_model(
    model_uri: str,
    dataset_uri: str,
    draft_uri: str,
    report: Output[HTML],
    card: Output[Markdown],
    metrics: Output[Metrics],
    seed: int = 0,
    num_speculative_tokens: int = 3,
    evaluation_conversations: int = 40,
    evaluation_max_new_tokens: int = 128,
    evaluation_prompts: str = "",
    evaluation_tree: str = "",
    evaluation_temperature: float = 0.0,
    register_model_name: str = "",
    mlflow_tracking_uri: str = "",
) -> None:
    """Decodes validation prompts with and without the draft, and adds report and model card to it.

    Args:
        model_uri: URI of the imported target.
        dataset_uri: URI of the data set.
        draft_uri: URI of the trained draft.
        report: the report, one HTML page.
        card: the model card, with commands to serve the draft.
        metrics: acceptance length, trained and untrained, and tokens that were compared.
        seed: Same seed, data and world size: same losses.
        num_speculative_tokens: Tokens the draft proposes per step of the target. Unit: tokens. Allowed:
            1..16.
        evaluation_conversations: Validation conversations that the evaluation decodes; 0: all. Unit:
            conversations. Allowed: >= 0.
        evaluation_max_new_tokens: Longest reply that the evaluation decodes. Unit: tokens. Allowed: >= 1.
        evaluation_prompts: Prompts to decode: a JSONL file, or benchmarks of mt-bench, gsm8k, humaneval,
            alpaca, cnn-dm with commas between; not given: those of the validation split.
        evaluation_tree: Decode also with a tree: children of each proposal at each depth, as 4,2,1; not
            given: chains alone.
        evaluation_temperature: Decode also by sampling at this temperature; 0: greedy alone. Allowed: >= 0.
        register_model_name: Name under which the draft is registered in MLflow, where tracking is set up; not
            given: it is not.
        mlflow_tracking_uri: MLflow server on which the stages are tracked, and that keeps a target named models:/;
            not given: MLFLOW_TRACKING_URI, which KFP's MLflow plugin sets. Allowed: no name or password in it.
    """
    outside = ("model_uri", "dataset_uri", "draft_uri", "report", "card", "metrics")
    given = {name: value for name, value in locals().items() if name not in (*outside, "outside")}
    import shutil

    from draft_model.doors import component
    from draft_model.evaluation import EvaluateConfig, run
    from draft_model.handed import check_handed
    from draft_model.parameters.rules import validate

    with component("evaluate") as work:
        check_handed({"import": model_uri, "dataset": dataset_uri, "train": draft_uri})
        parameters = validate(given, ["evaluate"])
        config = EvaluateConfig(model=model_uri, dataset=dataset_uri, final=draft_uri, work=work, parameters=parameters)
        result = run(config)
        shutil.copyfile(result.report, report.path)
        shutil.copyfile(result.card, card.path)
        if result.measured:
            metrics.log_metric("acceptance_length", result.acceptance_length)
            metrics.log_metric("untrained_acceptance_length", result.untrained_acceptance_length)
            metrics.log_metric("compared_tokens", result.compared_tokens)
            for place, share in enumerate(result.acceptance_by_position, start=1):
                metrics.log_metric(f"acceptance_at_position_{place}", share)
