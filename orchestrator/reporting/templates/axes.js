// Ticks of an axis of counts, such as layers: whole numbers, a dozen at most.
function wholeTicks(values) {
  const reach = Math.max(...values) - Math.min(...values);
  let step = 1;
  for (let i = 0; reach / step > 12; i++) step = [2, 5, 10][i % 3] * 10 ** Math.floor(i / 3);
  return { tickformat: ",d", dtick: step };
}
