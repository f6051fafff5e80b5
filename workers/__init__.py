"""The Celery side of Blastdoor: it builds walls, plays scenarios behind them, and tears them down."""
