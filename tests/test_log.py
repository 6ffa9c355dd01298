"""The log: it shows nobody's data, and is spared what is told elsewhere."""

import logging

import structlog

from radiance_mlx.api.server import _configure_logging


def test_tracebacks_in_the_log_show_no_variables(capsys):
    """They may hold users' data."""
    _configure_logging("info")
    try:
        prompt = "what a user " + "asked"
        try:
            raise ZeroDivisionError(len(prompt))
        except ZeroDivisionError:
            structlog.get_logger().exception("a bug")
    finally:
        structlog.reset_defaults()
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said
    assert "what a user asked" not in said


def test_the_log_is_spared_one_remark_of_transformers_and_no_other():
    """On texts that are too long, which are cut or refused with words of our own."""
    said = []
    catch = logging.Handler()
    catch.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addHandler(catch)
    _configure_logging("info")
    try:
        logger.warning("Token indices sequence length is longer than the specified maximum sequence length (9 > 8).")
        logger.warning("something else")
    finally:
        structlog.reset_defaults()
        logger.removeHandler(catch)
    assert said == ["something else"]
