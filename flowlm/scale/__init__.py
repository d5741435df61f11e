"""What a step costs on paper, compiled for chips that are not here, or measured."""
