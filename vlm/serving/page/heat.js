// Draw a heat map with values from 0 to 1 as colours.

// Stops of the colour map "inferno", whose lightness rises evenly, for colour-blind readers.
const STOPS = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];

function colour(value) {
  const at = Math.min(Math.max(value, 0), 1) * (STOPS.length - 1);
  const below = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[below].map((low, i) => low + (STOPS[below + 1][i] - low) * (at - below));
}

export function paintHeat(canvas, heat) {
  const height = heat.length, width = heat[0].length;
  const small = document.createElement("canvas");
  small.width = width;
  small.height = height;
  const pixels = new ImageData(width, height);
  heat.flat().forEach((value, i) => pixels.data.set([...colour(value), 255], 4 * i));
  small.getContext("2d").putImageData(pixels, 0, 0);
  const side = 512 / Math.max(width, height);
  canvas.width = Math.max(1, Math.round(width * side));
  canvas.height = Math.max(1, Math.round(height * side));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}
