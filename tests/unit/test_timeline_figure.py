"""A picture of live memory over time shows the record's own numbers."""

import io

import pytest
from PIL import Image

from slt_planner.reporting.figures import png_bytes
from slt_planner.reporting.timeline_figure import _live, _phases, _units_in_turn, timeline_figure
from tests.unit.test_profile_view import made


@pytest.mark.parametrize("measured", [True, False])
def test_the_areas_add_up_to_the_timeline_and_the_peak_is_marked(measured):
    profile = made(measured=measured)
    live = sum(_live(profile).values())
    assert list(live[1:]) == [point.live_bytes for point in profile.timeline]
    assert live.max() == profile.peak_bytes
    figure = timeline_figure(profile)
    memory, units = figure.axes
    marks = [line for line in memory.lines if line.get_marker() == "o"]
    assert marks[0].get_ydata()[0] == profile.peak_bytes
    assert "aten::convolution in unit 1 (conv)" in memory.texts[0].get_text()
    assert units.get_xlabel().startswith("ms" if measured else "allocations and releases")
    picture = Image.open(io.BytesIO(png_bytes(figure)))
    assert picture.size == (1600, 960)


def test_phases_are_told_by_operators_names():
    timeline = made().timeline
    assert [timeline[number].operator for number in _phases(timeline)] == ["aten::nll_loss_backward", "aten::add"]
    assert _phases(timeline[:5]) == []
    assert len(_phases(timeline[:8])) == 1


def test_between_operators_the_step_is_still_in_the_last_unit():
    assert _units_in_turn(made()) == [0, 0, 0, 1, 1, 1, 4, 1, 1, 1, 1]
