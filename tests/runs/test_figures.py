import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from hf_topkast.runs.chart import Line, line_chart, number, thinned, ticks
from hf_topkast.runs.heatmap import STOPS, heatmap, png, shortened


def points_of(figure):
    drawn = ElementTree.fromstring(re.search(r"<svg.*</svg>", figure, re.S)[0])
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in drawn.iter("polyline")
    ]


def test_a_line_goes_where_its_points_are():
    figure = line_chart("loss <1>", [Line("a&b", [(0, 0.0), (50, 1.0), (100, 0.5)], 3)], from_zero=True)
    assert "loss &lt;1&gt;" in figure and "a&amp;b" in figure and "c3" in figure
    ((zero, low), (half, high), (end, middle)) = points_of(figure)[0]
    assert half == pytest.approx((zero + end) / 2) and high < middle < low
    assert middle == pytest.approx((high + low) / 2, abs=0.2)


def test_the_first_points_do_not_press_the_rest_flat():
    lines = [Line("loss", [(1, 1000.0), *((step, 2 + step % 2) for step in range(10, 101))])]
    heights = [y for _, y in points_of(line_chart("loss", lines))[0]][1:]
    assert max(heights) - min(heights) > 100


def test_a_short_run_beside_a_long_one_stays_in_sight():
    lines = [Line("long", [(step, 2.0) for step in range(0, 1001, 100)]), Line("short", [(1, 5.0), (10, 4.0)])]
    heights = [[y for _, y in points] for points in points_of(line_chart("loss", lines))]
    assert 0 < min(heights[1]) < max(heights[1]) < max(heights[0])


def test_nothing_to_draw():
    assert line_chart("loss", [Line("a", [])]) == "" and heatmap("churn", [1], {"a": [None]}) == ""
    assert line_chart("loss", [Line("a", [(1, float("nan"))])]) == ""


@pytest.mark.parametrize("points", [[(5, 1.0)], [(1, 0.0), (2, 0.0)], [(0, -1.0), (1, -1.0)]])
def test_one_point_and_level_lines(points):
    assert "NaN" not in (figure := line_chart("loss", [Line("a", points)])) and points_of(figure)


def test_ticks():
    assert ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(0, 1600, 4) == [0, 500, 1000, 1500]
    assert [number(value) for value in (0, 0.05, 1500, 20_000, 3e6)] == ["0", "0.05", "1500", "20k", "3M"]


def test_thinned_keeps_the_last():
    points = [(step, step) for step in range(1201)]
    assert len(thinned(points)) < 700 and thinned(points)[-1] == (1200, 1200)
    assert list(thinned(points[:5])) == points[:5]


def test_a_pixel_for_each_number():
    image = pytest.importorskip("matplotlib.image")
    figure = heatmap("churn", [0, 10], {"h.0.attn": [0.0, 1.0], "h.1.attn": [None, 0.5]})
    picture = base64.b64decode(re.search(r'href="data:image/png;base64,([^"]+)"', figure)[1])
    pixels = (image.imread(io.BytesIO(picture)) * 255).round()
    assert pixels.shape == (2, 2, 4)
    np.testing.assert_array_equal(pixels[0, :, :3], [STOPS[0], STOPS[-1]])
    assert pixels[1, 0, 3] == 0 and pixels[1, 1, 3] == 255
    np.testing.assert_allclose(pixels[1, 1, :3], STOPS[2], atol=3)
    ElementTree.fromstring(re.search(r"<svg.*</svg>", figure, re.S)[0])
    assert ">0.attn<" in figure and ">1.attn<" in figure


def test_roundings_of_one_density_are_one_colour():
    figure = heatmap("density", [0, 10], {"h.0": [0.19999, 0.20001], "h.1": [0.20002, 0.2]})
    even = heatmap("density", [0, 10], {"h.0": [0.2, 0.2], "h.1": [0.2, 0.2]})
    assert figure == even and "0.2 everywhere" in figure


def test_many_layers_and_steps_stay_a_small_picture():
    rows = {f"layer.{place}": [place / 200] * 5000 for place in range(200)}
    figure = heatmap("density", list(range(5000)), rows)
    height = float(re.search(r'viewBox="0 0 \d+ (\d+)"', figure)[1])
    assert height < 850 and len(figure) < 30_000


def test_names_lose_what_they_share():
    assert shortened(["model.h.0.q", "model.h.1.q"]) == ["0.q", "1.q"]
    assert shortened(["alone.in.here"]) == ["alone.in.here"]
    assert shortened(["a", "b"]) == ["a", "b"] and shortened(["x.a", "x"]) == ["x.a", "x"]
    assert shortened(["a." + "b" * 40, "c"])[0].startswith("…") and len(shortened(["b" * 40])[0]) == 22
    assert png([[1]]).startswith("data:image/png;base64,")
