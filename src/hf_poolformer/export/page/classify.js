// What the model of this folder says about an image, for a page of one's own:
//
//     import { load } from "./classify.js";
//     const classify = await load();
//     const answers = await classify(file);  // [{ label: "cat", score: 0.93, given: true }, ...], best first
//
// An image is a File or Blob, an <img>, <video> or <canvas>, an ImageBitmap or ImageData. The image goes nowhere.
import { open, pixelsOf } from "./runtime.js";

export async function load(options = {}) {
  const model = await open(new URL("./", import.meta.url), options);
  const { labels, thresholds, kind } = model.settings;
  const classify = async (image) => {
    const scores = await model.run(await pixelsOf(image));
    const answers = labels.map((label, index) => ({ label, score: scores[index] }));
    if (kind === "labels") answers.forEach((answer, index) => (answer.given = answer.score >= thresholds[index]));
    return kind === "numbers" ? answers : answers.sort((one, other) => other.score - one.score);
  };
  return Object.assign(classify, { settings: model.settings, where: model.where });
}
