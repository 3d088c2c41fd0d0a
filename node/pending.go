package node

import (
	"context"
	"sync"

	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/sandbox"
)

func (n *Node) pull(context.Context, string) (image.Image, error) {
	return image.Image{}, sandbox.Errorf("node.pull", sandbox.NotFound, "", "no such image")
}

type buildLog struct {
	mu    sync.Mutex
	lines []LogLine
}
