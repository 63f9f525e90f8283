"""What engines that map tables call, alone and under Ray Data."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flip_hf import FlipProcessor
from flip_hf.data.schema import InputError
from flip_hf.integrations.ray import BatchEncoder, BatchScorer
from flip_hf.pipeline import CTRPredictionPipeline


@pytest.fixture
def rows(click_rows):
    return pa.table(click_rows)


def probabilities(folder, rows, **kwargs):
    scorer = BatchScorer(folder)
    assert isinstance(scorer.predict, CTRPredictionPipeline)
    return [result["probability"] for result in scorer.predict(rows, **kwargs)]


def test_scores_are_the_pipelines_in_the_rows_order(ctr_folder, rows):
    scored = BatchScorer(ctr_folder, batch_size=32)(rows)
    assert scored.column_names == [*rows.column_names, "probability"]
    assert scored["probability"].to_pylist() == pytest.approx(probabilities(ctr_folder, rows), abs=1e-6)
    assert scored.drop_columns(["probability"]).equals(rows)


def test_a_budget_and_a_mode_are_the_pipelines(ctr_folder, rows):
    some = BatchScorer(ctr_folder, text_budget=0.25)(rows)["probability"].to_pylist()
    assert some == pytest.approx(probabilities(ctr_folder, rows, text_budget=0.25), abs=1e-6)
    assert BatchScorer(ctr_folder, mode="id").predict.model.config.mode == "id"


def test_a_table_without_rows_has_no_scores(ctr_folder, rows):
    assert BatchScorer(ctr_folder)(rows.slice(0, 0))["probability"].to_pylist() == []


def test_scores_hide_no_column(ctr_folder, rows):
    with pytest.raises(ValueError, match="already has a column 'probability'"):
        BatchScorer(ctr_folder)(rows.append_column("probability", rows["age"]))


def test_encoded_rows_are_the_processors(ctr_folder, rows):
    wanted = FlipProcessor.from_pretrained(ctr_folder).encode(rows, with_label=True).drop_columns(["row"])
    assert BatchEncoder(ctr_folder, with_label=True)(rows).equals(wanted)


def test_a_column_numbers_the_encoded_rows(ctr_folder, rows):
    numbers = pa.array(range(900, 600, -1), pa.uint32())
    table = rows.append_column("number", numbers)
    encoded = BatchEncoder(ctr_folder, row_column="number")(table)
    wanted = FlipProcessor.from_pretrained(ctr_folder).encode(rows)
    assert encoded.equals(wanted.set_column(0, "row", numbers.cast(pa.int64())))
    # A field may number them, too.
    assert BatchEncoder(ctr_folder, row_column="age")(rows)["row"].equals(rows["age"])


@pytest.mark.parametrize("numbers", [None, [1.0] * 300, ["1"] * 300, [None, *range(299)]])
def test_row_numbers_are_whole_numbers_that_are_there(ctr_folder, rows, numbers):
    table = rows if numbers is None else rows.append_column("number", pa.array(numbers))
    with pytest.raises(InputError, match="field 'number': "):
        BatchEncoder(ctr_folder, row_column="number")(table)


@pytest.mark.slow
def test_ray_data_encodes_and_scores_files(ctr_folder, rows, tmp_path):
    """As docs/how_to/ray.md shows it."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'flip_hf[ray]'")
    log = tmp_path / "log"
    log.mkdir()
    for i in range(3):
        pq.write_table(rows.slice(100 * i, 100), log / f"{i}.parquet")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        options = {"batch_format": "pyarrow", "batch_size": 64, "compute": ray.data.ActorPoolStrategy(size=1)}
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        found = ray.data.read_parquet(str(log))
        scores, encoded = tmp_path / "scores", tmp_path / "encoded"
        found.map_batches(BatchScorer, fn_constructor_args=(str(ctr_folder),), **options).write_parquet(str(scores))
        found.map_batches(BatchEncoder, fn_constructor_args=(str(ctr_folder), True), **options).write_parquet(
            str(encoded)
        )
    finally:
        ray.shutdown()
    key = [(name, "ascending") for name in rows.column_names]
    wanted = BatchScorer(ctr_folder)(rows).sort_by(key)
    table = pq.read_table(scores).sort_by(key)
    assert table["probability"].to_pylist() == pytest.approx(wanted["probability"].to_pylist(), abs=1e-5)
    assert len(pq.read_table(encoded)) == len(rows)
