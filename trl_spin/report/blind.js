// The blind game: the reader clicks the real completion of each pair, the model chose the one of the larger margin
const game = document.getElementById("blind-pairs"), score = game.querySelector("output");
let played = 0, reader = 0, model = 0;
for (const pair of game.querySelectorAll(".pair")) {
  const buttons = [...pair.querySelectorAll("button")], verdict = pair.querySelector("[hidden]");
  for (const button of buttons) button.addEventListener("click", () => {
    if (!verdict.hidden) return;
    verdict.hidden = false;
    played += 1;
    reader += button.value === "real";
    model += Number(pair.dataset.margin) > 0;
    for (const side of buttons) {
      side.classList.add(side.value === "real" ? "good" : "bad");
      side.setAttribute("aria-disabled", "true");
      side.firstElementChild.textContent = side.value + (side === button ? ", your choice" : "");
    }
    score.textContent = `You: ${reader} of ${played}. The model: ${model} of ${played}.`;
  });
}
