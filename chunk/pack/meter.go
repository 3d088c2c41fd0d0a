package pack

import (
	"sync"
	"time"
)

// Remeasure is how long what was measured holds: a measurement is part of what a Meter says for this long, with falling
// weight, and no longer.
const Remeasure = 30 * time.Second

// A Meter measures a link and a processor continuously, from the work that is done anyway. It is safe for use by several
// goroutines.
type Meter struct {
	now func() time.Time

	mu   sync.Mutex
	last time.Time // until when sending has been counted
	link decaying  // bytes sent, by seconds of sending
	cpu  decaying  // seconds of the table's core, by seconds that it took
}

// NewMeter returns a meter that has measured nothing. now is the clock; nil means time.Now.
func NewMeter(now func() time.Time) *Meter {
	if now == nil {
		now = time.Now
	}
	return &Meter{now: now}
}

// Sent says that n bytes that were on their way since began have arrived now. Time in which others were on their way too
// counts once.
func (m *Meter) Sent(n int64, began time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.now()
	if m.last.After(began) {
		began = m.last
	}
	m.last = now
	m.link.add(now, float64(n), now.Sub(began).Seconds())
}

// Worked says that packing n bytes by a plan took d on one core.
func (m *Meter) Worked(p Plan, n int64, d time.Duration) {
	for _, k := range coders {
		if k.coder == p.Coder && (k.coder != Zstd || k.level == p.Level) {
			m.mu.Lock()
			m.cpu.add(m.now(), float64(n)/k.speed, d.Seconds())
			m.mu.Unlock()
			return
		}
	}
}

// Link is what the link carries now; DefaultLink when nothing was sent within Remeasure.
func (m *Meter) Link() Link {
	m.mu.Lock()
	defer m.mu.Unlock()
	if rate, ok := m.link.rate(m.now()); ok {
		return Link{Bandwidth: rate}
	}
	return DefaultLink
}

// CPU is how fast one of so many cores packs now; as the table says when nothing was packed within Remeasure.
func (m *Meter) CPU(cores float64) CPU {
	m.mu.Lock()
	defer m.mu.Unlock()
	if rate, ok := m.cpu.rate(m.now()); ok {
		return CPU{Cores: cores, Speed: rate}
	}
	return CPU{Cores: cores, Speed: 1}
}

// decaying is a ratio of two sums, over the slots of time that are not older than Remeasure. Newer slots count more.
type decaying struct {
	slots [slotCount]struct {
		number        int64 // of the slot since the epoch; 0: never used
		amount, spent float64
	}
}

const (
	slotCount = 6
	slotTime  = Remeasure / slotCount
)

func (d *decaying) add(now time.Time, amount, spent float64) {
	number := now.UnixNano() / int64(slotTime)
	s := &d.slots[number%slotCount]
	if s.number != number {
		s.number, s.amount, s.spent = number, 0, 0
	}
	s.amount += amount
	s.spent += spent
}

// rate is amount by spent; ok is false when too little was measured to say anything.
func (d *decaying) rate(now time.Time) (rate float64, ok bool) {
	number := now.UnixNano() / int64(slotTime)
	var amount, spent float64
	for _, s := range d.slots {
		if age := number - s.number; s.number > 0 && age >= 0 && age < slotCount {
			weight := 1 / float64(uint64(1)<<uint64(age))
			amount += s.amount * weight
			spent += s.spent * weight
		}
	}
	if spent < 1e-4 || amount <= 0 {
		return 0, false
	}
	return amount / spent, true
}
