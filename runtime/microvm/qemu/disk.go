package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
)

// NewLayer makes the nodes of a layer that stands upon nothing yet.
func (m *machine) NewLayer(ctx context.Context, disk int, path string) error {
	top, err := m.top(ctx, disk)
	if err == nil {
		err = m.dropLayer(ctx, disk, top+1) // of one that was never added
	}
	if err == nil {
		err = m.openLayer(ctx, disk, top+1, path)
	}
	if err != nil {
		return m.explain("open a layer of a disk", err)
	}
	return nil
}

// AddLayer puts the layer that NewLayer made upon the disk.
func (m *machine) AddLayer(ctx context.Context, disk int) error {
	top, err := m.top(ctx, disk)
	if err == nil {
		err = m.qmp.call(ctx, "blockdev-snapshot", map[string]any{"node": layerName(disk, top), "overlay": layerName(disk, top+1)}, nil)
	}
	if err != nil {
		return m.explain("add a layer to a disk", err)
	}
	return nil
}

// top is the number of the layer that the guest writes to.
func (m *machine) top(ctx context.Context, disk int) (int, error) {
	var drives []struct {
		Inserted struct {
			Node string `json:"node-name"`
		} `json:"inserted"`
	}
	if err := m.qmp.call(ctx, "query-block", nil, &drives); err != nil {
		return 0, err
	}
	for _, drive := range drives {
		if layer, ok := layerOf(drive.Inserted.Node, disk); ok {
			return layer, nil
		}
	}
	return 0, fmt.Errorf("the machine has no disk %d", disk)
}

// layerOf is the number of the disk's layer that a node is, if it is one.
func layerOf(node string, disk int) (layer int, ok bool) {
	var d int
	n, err := fmt.Sscanf(node, "disk%d-%d", &d, &layer)
	return layer, err == nil && n == 2 && d == disk
}

// openLayer makes the nodes of a layer.
func (m *machine) openLayer(ctx context.Context, disk, layer int, path string) error {
	set := fdset(disk, layer)
	for _, flags := range []int{os.O_RDONLY, os.O_RDWR} {
		f, err := os.OpenFile(path, flags, 0)
		if err != nil {
			return err
		}
		err = m.qmp.call(ctx, "add-fd", map[string]any{"fdset-id": set}, nil, int(f.Fd()))
		f.Close()
		if err != nil {
			return err
		}
	}
	err := m.qmp.call(ctx, "blockdev-add", map[string]any{
		"driver": "file", "node-name": fileName(disk, layer), "filename": fmt.Sprintf("/dev/fdset/%d", set),
		"locking": "off", "discard": "unmap", "cache": map[string]any{"no-flush": true},
	}, nil)
	if err != nil {
		return errors.Join(err, m.dropLayer(ctx, disk, layer))
	}
	err = m.qmp.call(ctx, "blockdev-add", map[string]any{
		"driver": "qcow2", "node-name": layerName(disk, layer), "file": fileName(disk, layer), "backing": nil, "discard": "unmap",
	}, nil)
	if err != nil {
		return errors.Join(err, m.dropLayer(ctx, disk, layer))
	}
	return nil
}

// dropLayer removes the nodes of a layer that nothing stands upon, and its
// descriptors. What is not there is no error: it may have been made by halves.
func (m *machine) dropLayer(ctx context.Context, disk, layer int) error {
	for _, c := range []struct {
		command string
		args    map[string]any
	}{
		{"blockdev-del", map[string]any{"node-name": layerName(disk, layer)}},
		{"blockdev-del", map[string]any{"node-name": fileName(disk, layer)}},
		{"remove-fd", map[string]any{"fdset-id": fdset(disk, layer)}},
	} {
		var refused *qmpError
		if err := m.qmp.call(ctx, c.command, c.args, nil); err != nil && !errors.As(err, &refused) {
			return err
		}
	}
	return nil
}

// fdset is a number for the descriptors of a layer that is added to a machine that runs.
func fdset(disk, layer int) int { return 1000*(disk+1) + layer }

// layers lists the numbers of a disk's layers, in ascending order.
func (m *machine) layers(ctx context.Context, disk int) ([]int, error) {
	var nodes []struct {
		Name string `json:"node-name"`
	}
	if err := m.qmp.call(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
		return nil, err
	}
	var out []int
	for _, n := range nodes {
		if layer, ok := layerOf(n.Name, disk); ok {
			out = append(out, layer)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("the machine has no disk %d", disk)
	}
	slices.Sort(out)
	return out, nil
}

// MergeLayers copies what lies between the lowest keep layers and the uppermost
// one into the latter.
func (m *machine) MergeLayers(ctx context.Context, disk, keep int) error {
	top, err := m.top(ctx, disk)
	if err == nil {
		err = m.dropLayer(ctx, disk, top+1) // of one that was never added
	}
	if err != nil {
		return err
	}
	layers, err := m.layers(ctx, disk)
	if err != nil || len(layers) <= keep+1 {
		return err
	}
	since, job := m.mark(), fmt.Sprintf("merge%d", disk)
	err = m.qmp.call(ctx, "block-stream", map[string]any{
		"job-id": job, "device": layerName(disk, layers[len(layers)-1]), "base-node": layerName(disk, layers[keep-1]),
	}, nil)
	if err == nil {
		err = m.await(ctx, since, func(e event) (bool, error) { return jobEnded(e, job) })
	}
	if err != nil {
		return m.explain("merge the layers of a disk", err)
	}
	for i := len(layers) - 2; i >= keep; i-- { // from the top: each stands upon the next
		if err := m.dropLayer(ctx, disk, layers[i]); err != nil {
			return err
		}
	}
	return nil
}

// jobEnded reports whether the event is the end of a job, and how it failed.
func jobEnded(e event, job string) (bool, error) {
	var data struct {
		Device string `json:"device"`
		Error  string `json:"error"`
	}
	if e.Name != "BLOCK_JOB_COMPLETED" && e.Name != "BLOCK_JOB_CANCELLED" || json.Unmarshal(e.Data, &data) != nil || data.Device != job {
		return false, nil
	}
	if data.Error != "" {
		return false, errors.New(data.Error)
	}
	return true, nil
}
