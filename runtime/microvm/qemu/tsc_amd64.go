package qemu

import "time"

// readTSC returns the processor's time-stamp counter.
func readTSC() uint64

// tscWindow is over how long the counter is watched: the error is a few hundred
// nanoseconds in it.
const tscWindow = 100 * time.Millisecond

// measureTSC finds the frequency of the counter in kHz. Emulated machines see it
// as it is, and cannot measure it well themselves.
func measureTSC() int {
	begin, from := time.Now(), readTSC()
	time.Sleep(tscWindow)
	took, ticks := time.Since(begin), readTSC()-from
	return int(float64(ticks) / (float64(took) / float64(time.Millisecond)))
}
