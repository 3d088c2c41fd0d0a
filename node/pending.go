package node

import (
	"context"
	"sync"

	"github.com/atoll-run/atoll/sandbox"
)

type buildLog struct {
	mu    sync.Mutex
	lines []LogLine
}

// BuildStatus tells how far a build has come.
func (n *Node) BuildStatus(ctx context.Context, templateID, buildID string) (Build, error) {
	t, err := n.GetTemplate(ctx, templateID)
	if err != nil {
		return Build{}, err
	}
	for _, b := range t.Builds {
		if b.ID == buildID {
			return b, nil
		}
	}
	return Build{}, sandbox.Errorf("node.BuildStatus", sandbox.NotFound, buildID, "no such build")
}

// BuildLogs returns a build's log from line offset on. Logs live as long as the
// process; those of builds from before it are empty.
func (n *Node) BuildLogs(ctx context.Context, templateID, buildID string, offset int) ([]LogLine, error) {
	if _, err := n.BuildStatus(ctx, templateID, buildID); err != nil {
		return nil, err
	}
	n.mu.RLock()
	log := n.builds[buildID]
	n.mu.RUnlock()
	if log == nil || offset < 0 {
		return nil, nil
	}
	log.mu.Lock()
	defer log.mu.Unlock()
	if offset >= len(log.lines) {
		return nil, nil
	}
	return append([]LogLine(nil), log.lines[offset:]...), nil
}
