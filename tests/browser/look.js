// What a page shows, as JSON. tests/browser/check evaluates it in the page.
(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });

  /** A colour of CSS, whatever its notation, as [red, green, blue, alpha] from 0 to 1. */
  const channels = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  };
  const over = ([r, g, b, alpha], below) => [r, g, b].map((value, index) => value * alpha + below[index] * (1 - alpha));

  /** The colour behind the text of an element. */
  const background = (element) => {
    const below = element.parentElement ? background(element.parentElement) : [1, 1, 1];
    return over(channels(getComputedStyle(element).backgroundColor), below);
  };

  // WCAG 2.2, "relative luminance" and "contrast ratio".
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const luminance = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => sum + share * linear(colour[i]), 0);
  const contrast = (one, other) => {
    const [less, more] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (more + 0.05) / (less + 0.05);
  };

  const isShown = (element) => [...element.getClientRects()].some((box) => box.width > 0 && box.height > 0);
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (node.data.trim() === "" || !isShown(element)) continue;
    const style = getComputedStyle(element);
    const below = background(element);
    texts.push({
      text: node.data.trim().slice(0, 60),
      contrast: contrast(over(channels(style.color), below), below),
      isTransparent: element.checkVisibility({ opacityProperty: true }) === false,
    });
  }
  texts.sort((a, b) => a.contrast - b.contrast);

  const bars = [...document.querySelectorAll(".row > b")].map((bar) => {
    const [box, row, style] = [bar.getBoundingClientRect(), bar.parentElement.getBoundingClientRect(),
      getComputedStyle(bar)];
    const colour = channels(style.borderRightColor).slice(0, 3);
    return {
      kind: bar.className.split(" ")[0],
      isDrawn: isShown(bar) && box.width >= 6 && box.height >= 10,
      // A bar is at least 12 px wide, also at the end of its row.
      isInside: box.left >= row.left - 12 && box.right <= row.right + 12 && box.top >= row.top
        && box.bottom <= row.bottom,
      contrast: contrast(colour, background(bar.parentElement)),
      colour: colour.map((value) => Math.round(value * 255)),
      x: box.right - 3 + scrollX,
      y: (box.top + box.bottom) / 2 + scrollY,
    };
  });

  scrollTo(10000, 0);
  const page = document.scrollingElement;
  return JSON.stringify({
    page: luminance(background(document.body)), texts, bars, text: document.body.innerText,
    rows: document.querySelectorAll(".row").length, events: document.querySelectorAll("tbody tr").length,
    marks: [...document.querySelectorAll(".axis span")].filter(isShown).length,
    scrolled: scrollX, width: page.scrollWidth, room: page.clientWidth,
    foreign: document.querySelectorAll("script, img, iframe, link, object, embed, svg, form").length,
  });
})();
