package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

const (
	balloonPath = "/machine/peripheral/balloon"
	// statsWait bounds how long a guest may take to say how it uses its memory.
	statsWait = 3 * time.Second
)

// Given is how much of its memory the guest may use now.
func (m *machine) Given(ctx context.Context) (int64, error) {
	var balloon struct {
		Actual int64 `json:"actual"`
	}
	err := m.qmp.call(ctx, "query-balloon", nil, &balloon)
	return balloon.Actual, err
}

// Give asks the guest to use so much of its memory.
func (m *machine) Give(ctx context.Context, size int64) error {
	return m.qmp.call(ctx, "balloon", map[string]any{"value": size}, nil)
}

// balloonStats is what QEMU knows of the guest's memory. It cannot say less than
// nothing: what the guest did not tell is all ones.
type balloonStats struct {
	Updated int64 `json:"last-update"` // seconds since 1970; 0: never
	Stats   struct {
		Available uint64 `json:"stat-available-memory"`
	} `json:"stats"`
}

// Available asks the guest how much of its memory it could do without.
func (m *machine) Available(ctx context.Context) (available int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, statsWait)
	defer cancel()
	before, err := m.balloonStats(ctx)
	if err != nil {
		return 0, err
	}
	// QEMU asks the guest after so many seconds, and again; 0 ends that.
	if err := m.pollBalloon(ctx, 1); err != nil {
		return 0, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
		defer cancel()
		err = errors.Join(err, m.pollBalloon(ctx, 0))
	}()
	for {
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return 0, fmt.Errorf("the guest does not say how it uses its memory: %w", ctx.Err())
		}
		now, err := m.balloonStats(ctx)
		if err != nil {
			return 0, err
		}
		if now.Updated == before.Updated {
			continue
		}
		if now.Stats.Available > 1<<62 {
			return 0, errors.New("the guest does not tell how much memory it could do without")
		}
		return int64(now.Stats.Available), nil
	}
}

func (m *machine) pollBalloon(ctx context.Context, seconds int) error {
	return m.qmp.call(ctx, "qom-set", map[string]any{"path": balloonPath, "property": "guest-stats-polling-interval", "value": seconds}, nil)
}

func (m *machine) balloonStats(ctx context.Context) (s balloonStats, err error) {
	var raw json.RawMessage
	if err := m.qmp.call(ctx, "qom-get", map[string]any{"path": balloonPath, "property": "guest-stats"}, &raw); err != nil {
		return s, err
	}
	return s, json.Unmarshal(raw, &s)
}
